"""Ollama's embeddings: what its bodies mean and what it answers. Row C13's sister."""

from math import hypot
from typing import Any

import httpx
import pytest

from server.types import FinishReason, GenerationRequest, Pooling, TokenEvent
from tests.server.api.fake_service import FakeService, finish_of

EMBED, OLD = "/api/embed", "/api/embeddings"


def vectors(request: GenerationRequest) -> list[TokenEvent]:
    """Of each prompt one vector, in an order of their own."""
    events = []
    for index in reversed(range(request.num_choices)):
        finish = finish_of(request, "", 0, reason=FinishReason.LENGTH, index=index)
        events.append(TokenEvent(index, "", None, finish, (), (0.6, 0.0, 0.8 * (-1) ** index)))
    return events


@pytest.fixture(autouse=True)
def pooled(service: FakeService) -> None:
    service.script = vectors


async def error_of(client: httpx.AsyncClient, path: str, body: Any, status: int = 400) -> str:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    return str(response.json()["error"])


async def test_each_text_has_a_vector_in_its_place(client: httpx.AsyncClient, service: FakeService) -> None:
    answer = (await client.post(EMBED, json={"model": "base", "input": ["Hi", "Hello"]})).json()

    assert answer == {
        "model": "base",
        "embeddings": [[0.6, 0.0, 0.8], [0.6, 0.0, -0.8]],
        "total_duration": 50_000_000,
        "load_duration": 5_000_000,
        "prompt_eval_count": 9,
    }
    assert service.last.pooling is Pooling.MEAN
    assert [service.tokenizer.decode(prompt) for prompt in service.last.prompts] == ["Hi", "Hello"]
    assert service.is_idle


async def test_one_text_is_a_list_of_one(client: httpx.AsyncClient) -> None:
    answer = (await client.post(EMBED, json={"model": "base", "input": "Hi"})).json()

    assert answer["embeddings"] == [[0.6, 0.0, 0.8]]


async def test_the_old_route_answers_the_vector_alone(client: httpx.AsyncClient) -> None:
    answer = await client.post(OLD, json={"model": "base", "prompt": "Hi"})

    assert answer.json() == {"embedding": [0.6, 0.0, 0.8]}


async def test_an_adapter_embeds_as_it_generates(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("pirate")
    for path in (EMBED, OLD):
        body = {"model": "pirate:latest", "input": "Hi", "prompt": "Hi"}
        response = await client.post(path, json=body)
        assert response.headers["x-adapter-id"] == "pirate"
        assert service.last.adapter is not None
        assert service.last.adapter.name == "pirate"


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        (EMBED, {}, {"model": "pirate", "embeddings": []}),
        (EMBED, {"input": ""}, {"model": "pirate", "embeddings": []}),
        (EMBED, {"input": [], "keep_alive": 0}, {"model": "pirate", "embeddings": []}),
        (OLD, {}, {"embedding": []}),
        (OLD, {"prompt": ""}, {"embedding": []}),
    ],
)
async def test_nothing_to_embed_loads_the_model(
    client: httpx.AsyncClient,
    service: FakeService,
    path: str,
    body: dict[str, Any],
    answer: dict[str, Any],
) -> None:
    service.registry.add("pirate")

    assert (await client.post(path, json={"model": "pirate", **body})).json() == answer
    assert len(service.leases) == 1
    assert service.is_idle


@pytest.mark.parametrize(("dimensions", "size"), [(0, 3), (1, 1), (2, 2), (3, 3), (4, 3)])
async def test_fewer_dimensions_are_the_first_ones_of_length_one(
    client: httpx.AsyncClient, dimensions: int, size: int
) -> None:
    body = {"model": "base", "input": "Hi", "dimensions": dimensions}
    vector = (await client.post(EMBED, json=body)).json()["embeddings"][0]

    assert len(vector) == size
    assert hypot(*vector) == pytest.approx(1)
    assert vector[0] > 0


async def test_a_text_beyond_the_context_loses_its_end(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body: dict[str, Any] = {"model": "base", "input": ["ab" * 5000, "short"]}
    assert (await client.post(EMBED, json=body)).status_code == 200
    assert service.tokenizer.decode(service.last.prompts[0]) == "ab" * 499 + "a"
    assert len(service.last.prompts[0]) == 1000
    assert service.tokenizer.decode(service.last.prompts[1]) == "short"

    await client.post(EMBED, json={**body, "options": {"num_ctx": 11}})
    assert service.tokenizer.decode(service.last.prompts[0]) == "ab" * 5

    await client.post(OLD, json={"model": "base", "prompt": "x" * 5000})
    assert len(service.last.prompts[0]) == 1000


async def test_without_truncation_a_text_beyond_the_context_is_refused(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body = {"model": "base", "input": "x" * 1000, "truncate": False}
    assert (await error_of(client, EMBED, body)).startswith("the input length exceeds the context length")

    assert (await client.post(EMBED, json={**body, "input": "x" * 999})).status_code == 200
    assert len(service.last.prompts[0]) == 1000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (EMBED, {"input": "Hi"}, "model"),
        (EMBED, {"model": "base", "input": 1}, "input"),
        (EMBED, {"model": "base", "input": ["Hi", 1]}, "input"),
        (EMBED, {"model": "base", "input": [[1, 2]]}, "input"),
        (EMBED, {"model": "base", "input": "Hi", "dimensions": -1}, "dimensions"),
        (EMBED, {"model": "base", "input": "Hi", "truncate": "no"}, "truncate"),
        (EMBED, {"model": "base", "input": "Hi", "keep_alive": "soon"}, "keep_alive"),
        (EMBED, {"model": "base", "input": "Hi", "options": {"num_ctx": 0}}, "num_ctx"),
        (OLD, {"prompt": "Hi"}, "model"),
        (OLD, {"model": "base", "prompt": ["Hi"]}, "prompt"),
    ],
)
async def test_a_wrong_value_is_refused_by_name(
    client: httpx.AsyncClient, service: FakeService, path: str, body: dict[str, Any], param: str
) -> None:
    assert param in await error_of(client, path, body)
    assert service.is_idle


@pytest.mark.parametrize("path", [EMBED, OLD])
async def test_an_unknown_model_is_not_found(client: httpx.AsyncClient, path: str) -> None:
    for more in ({}, {"input": "Hi", "prompt": "Hi"}):
        error = await error_of(client, path, {"model": "nobody", **more}, status=404)
        assert error == "model 'nobody' not found"


async def test_texts_of_one_request_have_a_limit(make_state: Any, client: httpx.AsyncClient) -> None:
    assert "1025 prompts" in await error_of(client, EMBED, {"model": "base", "input": ["x"] * 1025})
