"""Anthropic's `/v1/messages`: what bodies mean and what answers say.

Streams are golden files too, and the real SDK is in tests/e2e.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.api.anthropic.render import MessageWriter
from server.api.app import build_app
from server.api.state import Phase, ServerState
from server.errors import Overloaded
from server.types import FinishReason, SamplingDefaults, SamplingParams
from tests.server.api.conftest import begin, connect, serve
from tests.server.api.fake_service import FakeService, Script, finish_of, token_event, words

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
TURNS: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
HELLO: dict[str, Any] = {"model": "base", "max_tokens": 2, "messages": TURNS}


async def answer(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()
    return message


def prompt_of(service: FakeService) -> str:
    return service.tokenizer.decode(service.last.prompts[0])


async def test_system_and_content_may_be_text_or_blocks(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    cached = {"type": "ephemeral"}
    blocks = [{"type": "text", "text": "Be ", "cache_control": cached}, {"type": "text", "text": "brief."}]
    for system, content in (("Be brief.", "Hi"), (blocks, [{"type": "text", "text": "Hi"}])):
        await answer(client, {**HELLO, "system": system, "messages": [{"role": "user", "content": content}]})

        assert prompt_of(service) == "<system>Be brief.<user>Hi<assistant>"


async def test_last_message_of_the_assistant_is_the_beginning_of_the_answer(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    await answer(client, {**HELLO, "messages": [*TURNS, {"role": "assistant", "content": "So"}]})

    assert prompt_of(service) == "<user>Hi<assistant>So"


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("pirate")
    fields = {
        "model": "pirate",
        "max_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stop_sequences": ["a", "b"],
        "metadata": {"user_id": "u"},
    }
    message = await answer(client, {**HELLO, **fields})

    assert message["model"] == "pirate"
    assert service.last.sampling == SamplingParams(temperature=0.5, top_p=0.9, top_k=40)
    assert (service.last.stop.max_tokens, service.last.stop.stop) == (50, ("a", "b"))
    assert not service.last.stop.keep_stop
    assert service.last.adapter is not None
    assert service.last.adapter.name == "pirate"


async def test_models_own_defaults_come_before_anthropics(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    usual = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.05)
    service.card = dataclasses.replace(service.card, generation_defaults=usual)
    await answer(client, {**HELLO, "temperature": 0})

    assert service.last.sampling == SamplingParams(
        temperature=0, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.05
    )


@pytest.mark.parametrize(
    ("script", "max_tokens", "reason", "sequence"),
    [
        (words("a", "b", reason=FinishReason.STOP), 5, "end_turn", None),
        (words("a", "b", reason=FinishReason.STOP, stop=7), 5, "end_turn", None),
        (words("a", "b", reason=FinishReason.STOP, stop="END"), 5, "stop_sequence", "END"),
        (words("a", "b"), 2, "max_tokens", None),
        (words("a", "b"), 5, "model_context_window_exceeded", None),
    ],
)
async def test_stop_reasons(
    client: httpx.AsyncClient,
    service: FakeService,
    script: Script,
    max_tokens: int,
    reason: str,
    sequence: str | None,
) -> None:
    service.script = script
    body = {**HELLO, "max_tokens": max_tokens}
    message = await answer(client, body)
    streamed = (await client.post(PATH, json={**body, "stream": True})).text
    (delta,) = (json.loads(line[6:])["delta"] for line in streamed.split("\n") if '"message_delta"' in line)

    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)
    assert (delta["stop_reason"], delta["stop_sequence"]) == (reason, sequence)


async def test_max_tokens_is_cut_to_what_the_context_leaves(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """Every request must bring one, so clients bring large ones."""
    await answer(client, {**HELLO, "max_tokens": 100_000})

    assert service.last.stop.max_tokens == 1000 - len(service.last.prompts[0])


async def test_prompt_that_fills_the_context_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={**HELLO, "messages": [{"role": "user", "content": "x" * 1000}]})

    assert response.status_code == 400
    assert "maximum context length is 1000 tokens" in response.json()["error"]["message"]


async def test_cached_tokens_are_counted_apart(client: httpx.AsyncClient, service: FakeService) -> None:
    def script(request: Any) -> list[Any]:
        finish = finish_of(request, "a", 1)
        usage = dataclasses.replace(finish.usage, cached_tokens=10)
        return [token_event("a", finish=dataclasses.replace(finish, usage=usage))]

    service.script = script
    usage = (await answer(client, HELLO))["usage"]

    assert usage["cache_read_input_tokens"] == 10
    assert usage["input_tokens"] + 10 == len(service.last.prompts[0])


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ({"model": None}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]: image"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_result"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": [""]}, "stop"),
        ({"stop_sequences": [5]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 65}, "stop_sequences"),
        ({"tools": [{"name": "f", "input_schema": {}}]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"effort": "low"}}, "output_config"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"metadata": {"user_id": 5}}, "metadata.user_id"),
    ],
    ids=str,
)
async def test_what_is_wrong_or_not_served_is_refused_by_name(
    client: httpx.AsyncClient, service: FakeService, field: dict[str, Any], named: str
) -> None:
    response = await client.post(PATH, json={**HELLO, **field})

    assert response.status_code == 400
    error = response.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert named in error["error"]["message"]
    assert service.is_idle


async def test_values_that_ask_for_nothing_are_accepted(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body = {
        **HELLO,
        "tools": [],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
        "service_tier": "auto",
        "stop_sequences": None,
        "cache_control": {"type": "ephemeral"},
        "inference_geo": "eu",
        "never_heard_of": 1,
    }
    response = await client.post(f"{PATH}?beta=true", json=body, headers={"anthropic-version": "2023-06-01"})

    assert response.status_code == 200
    assert service.last.sampling == SamplingParams()


async def test_count_tokens_is_what_the_request_would_have(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("pirate")
    body = {"model": "pirate", "system": "Be brief.", "messages": TURNS}
    counted = await client.post(COUNT, json=body)
    message = await answer(client, {**body, "max_tokens": 2})

    assert counted.json() == {"input_tokens": message["usage"]["input_tokens"]}
    assert service.is_idle


@pytest.mark.parametrize(
    ("field", "status"), [({"model": "nobody"}, 404), ({"messages": []}, 400), ({"tools": [{}]}, 400)]
)
async def test_count_tokens_refuses_what_the_request_would_be_refused_for(
    client: httpx.AsyncClient, field: dict[str, Any], status: int
) -> None:
    response = await client.post(COUNT, json={"model": "base", "messages": TURNS, **field})

    assert response.status_code == status
    assert response.json()["type"] == "error"


async def test_errors_of_all_kinds_have_anthropics_shape(
    make_state: Callable[..., ServerState], service: FakeService
) -> None:
    state = make_state(api_key="secret")
    async with connect(build_app(state)) as client:
        unknown_key = await client.post(PATH, json=HELLO)
        client.headers["x-api-key"] = "secret"
        unknown_model = await client.post(PATH, json={**HELLO, "model": "nobody"})
        unknown_path = await client.post("/v1/messages/batches", json={})
        wrong_method = await client.get(PATH)
        too_large = await client.post(PATH, content=b" " * (8 * 2**20 + 1))
        service.refusal = Overloaded("the queue is full", retry_after_s=1)
        overloaded = await client.post(PATH, json=HELLO)
        state.phase = Phase.DRAINING
        draining = await client.post(PATH, json=HELLO)

    answers = [unknown_key, unknown_model, unknown_path, wrong_method, too_large, overloaded, draining]
    assert [(a.status_code, a.json()["error"]["type"]) for a in answers] == [
        (401, "authentication_error"),
        (404, "not_found_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (503, "overloaded_error"),
    ]
    assert all(a.json()["type"] == "error" and a.json()["error"]["message"] for a in answers)
    assert [a.headers.get("retry-after") for a in answers[-2:]] == ["1", "5"]


async def test_silence_is_filled_with_pings(
    manual: FakeService, make_state: Callable[..., ServerState]
) -> None:
    async with serve(build_app(make_state(header_deadline_s=0.01, keep_alive_s=0.02))) as port:
        connection, stream = await begin(port, manual, (PATH, {**HELLO, "stream": True}))
        await connection.read_head()
        first = await connection.read_chunk()
        stream.put(token_event("a", finish=finish_of(stream.request, "a", 1)))
        while b"event: message_stop" not in await connection.read_chunk():
            pass
        connection.drop()

    assert first == b'event: ping\ndata: {"type":"ping"}\n\n'


async def test_slow_reader_gets_joined_deltas(client: httpx.AsyncClient, service: FakeService) -> None:
    await answer(client, HELLO)
    accepted = _Accepted(service)
    writer = MessageWriter(accepted, 2)  # type: ignore[arg-type]
    events = [token_event("a"), token_event("b", finish=finish_of(service.last, "ab", 2))]
    frames = list(writer.frames(events, join=True))

    assert [frame.split(b"\n")[0] for frame in frames] == [
        b"event: message_start",
        b"event: content_block_start",
        b"event: content_block_delta",
    ]
    assert b'"text":"ab"' in frames[-1]


class _Accepted:
    """As much of an accepted request as the writer looks at."""

    model = "base"

    def __init__(self, service: FakeService) -> None:
        self.request = service.last
        self.prompt = self
        self.ids = service.last.prompts[0]
