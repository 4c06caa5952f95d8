"""The x- headers. Rows L6, L7, U3."""

import dataclasses
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.api.app import build_app
from server.api.headers import header_value
from server.api.state import ServerState
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService

ON_ALL = {
    "x-request-id",
    "x-model-id",
    "x-adapter-id",
    "x-compute-type",
    "x-compute-characters",
    "x-prompt-tokens",
    "x-compute-time",
}
ON_WHOLE = {
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-time-to-first-token",
    "x-time-per-output-token",
    "x-generated-tokens",
    "x-skipped-tokens",
    "x-total-tokens",
}
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
BODIES = {
    "/v1/chat/completions": HELLO,
    "/v1/completions": {"prompt": "Hi"},
    "/": {"inputs": "Hi"},
    "/generate": {"inputs": "Hi"},
}


def x_headers(response: httpx.Response) -> set[str]:
    return {name for name in response.headers if name.startswith("x-")}


@pytest.mark.parametrize("path", BODIES)
async def test_L6_whole_answers_carry_them_all(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json=BODIES[path])

    assert x_headers(response) == ON_ALL | ON_WHOLE
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**HELLO, "stream": True}),
        ("/v1/completions", {"prompt": "Hi", "stream": True}),
        ("/", {"inputs": "Hi", "stream": True}),
        ("/generate_stream", {"inputs": "Hi"}),
    ],
)
async def test_L7_streams_carry_what_is_known_when_the_head_leaves(
    client: httpx.AsyncClient, path: str, body: dict[str, object]
) -> None:
    """T14: no totals. T18: proxies are told neither to keep nor to change it."""
    response = await client.post(path, json=body)

    assert x_headers(response) == ON_ALL | {"x-accel-buffering"}
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache, no-transform"
    assert response.headers["x-accel-buffering"] == "no"
    assert "connection" not in response.headers
    assert "content-length" not in response.headers


async def test_times_are_whole_milliseconds_of_what_they_say(client: httpx.AsyncClient) -> None:
    """Received at 0, queued at 2, started at 5, first token at 30, last one at 50 ms; two tokens."""
    headers = (await client.post("/generate", json={"inputs": "Hi"})).headers
    times = {name: int(headers[name]) for name in headers if name.endswith(("-time", "-token"))}

    assert times == {
        "x-compute-time": 47,
        "x-total-time": 50,
        "x-validation-time": 2,
        "x-queue-time": 3,
        "x-inference-time": 45,
        "x-time-per-token": 23,
        "x-time-to-first-token": 25,
        "x-time-per-output-token": 20,
    }
    assert (headers["x-prompt-tokens"], headers["x-generated-tokens"], headers["x-total-tokens"]) == (
        "3",
        "2",
        "5",
    )


async def test_tokens_of_all_choices_are_counted(client: httpx.AsyncClient) -> None:
    headers = (await client.post("/v1/completions", json={"prompt": "Hi", "n": 3})).headers

    assert (headers["x-generated-tokens"], headers["x-total-tokens"]) == ("6", "9")


async def test_compute_time_of_a_stream_is_the_time_until_its_head(
    make_state: Callable[..., ServerState],
) -> None:
    state = make_state()
    ticks = iter([100.0, 100.1, 100.2, 100.75])
    state.clock = lambda: next(ticks)
    async with connect(build_app(state)) as client:
        response = await client.post("/generate_stream", json={"inputs": "Hi"})

    assert response.headers["x-compute-time"] == "750"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("org/pirate-v1.2", "org/pirate-v1.2"),
        ("pirate\r\nx-evil: 1", "pirate%0D%0Ax-evil:%201"),
        ("Seeräuber", "Seer%C3%A4uber"),
        ("50%", "50%"),
        ("", ""),
    ],
)
async def test_ids_are_percent_encoded_where_they_are_not_visible_ascii(
    client: httpx.AsyncClient, service: FakeService, name: str, value: str
) -> None:
    assert header_value(name) == value
    if name:
        service.registry.add(name)
        response = await client.post(
            "/generate_stream", json={"inputs": "Hi", "parameters": {"adapter_id": name}}
        )
        assert response.headers["x-adapter-id"] == value


async def test_name_of_the_model_is_encoded_too(client: httpx.AsyncClient, service: FakeService) -> None:
    service.card = dataclasses.replace(service.card, id="my model", compute_type="gpu")
    headers = (await client.post("/generate", json={"inputs": "Hi"})).headers

    assert (headers["x-model-id"], headers["x-compute-type"]) == ("my%20model", "gpu")


async def test_adapter_unloaded_while_in_use_still_has_a_source(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("pirate")
    resolve = service.resolve

    async def resolve_then_unload(name: str | None, *wish: Any) -> object:
        lease = await resolve(name, *wish)
        service.registry.adapters.clear()
        return lease

    service.resolve = resolve_then_unload  # type: ignore[assignment, method-assign]
    response = await client.post("/generate", json={"inputs": "Hi", "parameters": {"adapter_id": "pirate"}})

    assert response.headers["x-adapter-source"] == "local"
