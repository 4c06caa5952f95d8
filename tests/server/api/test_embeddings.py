"""`POST /v1/embeddings`. Row C13."""

import base64
import dataclasses
import struct
from typing import Any

import httpx
import openai
import pytest

from adapters.types import AdapterUse
from server.types import GenerationRequest, Pooling, TokenEvent
from tests.server.api.fake_service import BOS, FakeService, finish_of

EMBEDDINGS = "/v1/embeddings"


def vectors(request: GenerationRequest) -> list[TokenEvent]:
    """One for each prompt, the last one first."""
    return [
        TokenEvent(index, "", None, finish_of(request, "", 0, index=index), vector=(0.6, -0.8, float(index)))
        for index in reversed(range(request.num_choices))
    ]


@pytest.fixture(autouse=True)
def _made_of_vectors(service: FakeService) -> None:
    service.script = vectors
    service.card = dataclasses.replace(service.card, hidden_size=3)


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(EMBEDDINGS, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_C13_an_embedding_has_the_shape_of_openai(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    answer = await ask(client, input="Hi", model="base")

    assert answer == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8, 0.0]}],
        "model": "base",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    assert service.last.pooling is Pooling.MEAN
    assert (service.last.stop.max_tokens, service.last.n) == (0, 1)
    assert service.is_idle


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("Hi", [(BOS, 72, 105)]),
        (["Hi", "Ho"], [(BOS, 72, 105), (BOS, 72, 111)]),
        ([72, 105], [(72, 105)]),
        ([[72, 105], [9]], [(72, 105), (9,)]),
    ],
    ids=str,
)
async def test_input_is_text_or_ids_or_a_list_of_either(
    client: httpx.AsyncClient, service: FakeService, value: object, prompts: list[tuple[int, ...]]
) -> None:
    answer = await ask(client, input=value)

    assert list(service.last.prompts) == prompts
    assert [entry["embedding"][2] for entry in answer["data"]] == list(range(len(prompts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient) -> None:
    answer = await ask(client, input=["Hi", "Ho"], encoding_format="base64")

    for index, entry in enumerate(answer["data"]):
        numbers = struct.unpack("<3f", base64.b64decode(entry["embedding"]))
        assert numbers == pytest.approx((0.6, -0.8, index))


async def test_sdk_reads_its_default_encoding_and_floats(port: int) -> None:
    """The SDK asks for base64 unless told otherwise, and turns it into numbers itself."""
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any") as sdk:
        default = await sdk.embeddings.create(model="base", input=["Hi", "Ho"])
        floats = await sdk.embeddings.create(model="base", input=["Hi", "Ho"], encoding_format="float")

    assert [entry.embedding for entry in default.data] == [
        pytest.approx(entry.embedding) for entry in floats.data
    ]
    assert default.usage.total_tokens == 6


@pytest.mark.parametrize("name", ["model", "lora_id"])
async def test_an_adapter_makes_vectors_of_its_own(
    client: httpx.AsyncClient, service: FakeService, name: str
) -> None:
    info = service.registry.add("pirate")
    response = await client.post(EMBEDDINGS, json={"input": "Hi", name: "pirate"})

    assert service.last.adapter == AdapterUse.of(info.ref)
    assert response.json()["model"] == "pirate"
    assert response.headers["x-adapter-id"] == "pirate"
    assert response.headers["x-generated-tokens"] == "0"
    assert service.is_idle


@pytest.mark.parametrize(("asked", "pooling"), [("last", Pooling.LAST), ("mean", Pooling.MEAN)])
async def test_pooling_can_be_chosen(
    client: httpx.AsyncClient, service: FakeService, asked: str, pooling: Pooling
) -> None:
    await ask(client, input="Hi", pooling=asked)

    assert service.last.pooling is pooling


async def test_values_that_ask_for_what_happens_anyway_are_accepted(client: httpx.AsyncClient) -> None:
    await ask(client, input="Hi", dimensions=3, user="u", normalize=True, priority=0, messages=None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["Hi", 5]}, "input"),
        ({"input": {"text": "Hi"}}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": "x" * 4001}, "input"),
        ({"input": [70] * 1001}, "input"),
        ({"input": ["Hi"] * 1025}, "input"),
        ({"input": "", "add_special_tokens": False}, "input"),
        ({"input": "Hi", "dimensions": 2}, "dimensions"),
        ({"input": "Hi", "dimensions": "3"}, "dimensions"),
        ({"input": "Hi", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "Hi", "pooling": "cls"}, "pooling"),
        ({"input": "Hi", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "Hi", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "Hi", "truncate_prompt_tokens": 1001}, "truncate_prompt_tokens"),
        ({"input": "Hi", "truncate_prompt_tokens": 5, "truncation_side": "left"}, "truncation_side"),
        ({"input": "Hi", "normalize": False}, "normalize"),
        ({"input": "Hi", "model": 5}, "model"),
        ({"input": "Hi", "model": "nobody"}, "model"),
        ({"input": "Hi", "model": "a", "lora_id": "b"}, "lora_id"),
    ],
    ids=lambda case: str(case)[:60],
)
async def test_wrong_parameters_are_named(
    client: httpx.AsyncClient, service: FakeService, body: dict[str, Any], param: str
) -> None:
    response = await client.post(EMBEDDINGS, json=body)

    assert response.status_code == (404 if body.get("model") == "nobody" else 400)
    assert response.json()["error"]["param"] == param
    assert service.is_idle


async def test_an_input_may_fill_the_context(client: httpx.AsyncClient) -> None:
    answer = await ask(client, input=[70] * 1000)

    assert answer["usage"]["total_tokens"] == 1000


@pytest.mark.parametrize("value", ["Hello, world", list(range(70, 90)), "x" * 5000, [70] * 1001], ids=len)
@pytest.mark.parametrize("most", [-1, 5])
async def test_C13_inputs_are_cut_for_those_who_ask(
    client: httpx.AsyncClient, service: FakeService, value: str | list[int], most: int
) -> None:
    """As vLLM's load generator asks for embeddings: with `truncate_prompt_tokens` of -1."""
    whole = value if isinstance(value, list) else [BOS, *map(ord, value)]
    await ask(client, input=value, truncate_prompt_tokens=most)

    assert list(service.last.prompts[0]) == whole[: most if most > 0 else 1000]


async def test_large_answers_are_written_in_the_pool(client: httpx.AsyncClient, service: FakeService) -> None:
    def script(request: GenerationRequest) -> list[TokenEvent]:
        return [
            TokenEvent(index, "", None, finish_of(request, "", 0, index=index), vector=(0.5,) * 1000)
            for index in range(request.num_choices)
        ]

    service.script = script
    answer = await ask(client, input=["Hi"] * 20)

    assert [len(entry["embedding"]) for entry in answer["data"]] == [1000] * 20
