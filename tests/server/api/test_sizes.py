"""Large requests: refused before they cost anything, or worked on where nobody waits for it."""

import asyncio
import gc
import json
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import httpx
import pytest
from starlette.types import Message

from server.api import json_body
from server.api.app import build_app
from server.api.json_body import INLINE_BYTES, parse_object
from server.api.kserve import wish as kserve
from server.api.messages import count_chars
from server.api.ollama import embed as ollama_embed
from server.api.openai import embeddings as openai_embeddings
from server.api.shapes import json_text, long_json_text
from server.api.state import ServerState
from server.types import Alternative, GenerationRequest, TokenEvent
from tests.server.api.conftest import begin, connect
from tests.server.api.fake_service import FakeService, finish_of, token_event
from tests.server.api.raw_http import until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = "x" * 5_000_000
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "message",
    [
        {"name": LONG},
        {"tool_call_id": LONG},
        {"tool_calls": [{**CALL, "id": LONG}]},
        {"tool_calls": [{**CALL, LONG: 1}]},
        {"tool_calls": [{**CALL, "function": {"name": LONG, "arguments": "{}"}}]},
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": json.dumps({"a": [LONG]})}}]},
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": json.dumps([1] * 1_000_000)}}]},
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": json.dumps([{}] * 100_000)}}]},
    ],
    ids=["name", "tool_call_id", "id", "key", "function", "argument", "numbers", "objects"],
)
async def test_all_that_a_template_may_print_is_counted_before_it_is_rendered(
    client: httpx.AsyncClient, service: FakeService, message: dict[str, object]
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, **message}]
    response = await client.post(CHAT, json={"messages": messages})

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert service.tokenizer.rendered == []
    assert service.is_idle


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user"}] * 20_000, "messages"),
        ([{"role": "assistant", "tool_calls": [{}] * 20_000}], "messages[0].tool_calls"),
    ],
    ids=["messages", "tool_calls"],
)
async def test_tens_of_thousands_of_messages_or_calls_are_refused(
    client: httpx.AsyncClient, service: FakeService, messages: list[object], param: str
) -> None:
    response = await client.post(CHAT, json={"messages": messages})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert service.is_idle


def test_characters_of_messages_are_those_of_all_their_values() -> None:
    assert count_chars([{"role": "user", "content": "abc"}]) == 7
    assert count_chars([{"tool_calls": [{"a": ["b", 10, None, True]}]}]) == 2 + 2 + 1 + 2 + 1 + 2 + 4 + 4


async def test_what_a_template_makes_too_long_is_refused_before_it_is_tokenised(
    client: httpx.AsyncClient, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.tokenizer, "render_chat", lambda messages, **options: "x" * 4001)
    response = await client.post(CHAT, json={"messages": [{"role": "user", "content": "Hi"}]})

    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert service.tokenizer.num_encoded == 0
    assert service.is_idle


async def test_text_beyond_the_context_is_not_tokenised_for_show(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """As generation would refuse it, with the words and the status of the route's family."""
    response = await client.post("/tokenize", json={"inputs": "x" * 4001})

    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    assert "4001 characters" in response.json()["error"]


@pytest.mark.parametrize(
    "body", [{"prompt": "x" * 4001}, {"prompt": [65] * 1000}], ids=["characters", "tokens"]
)
async def test_prompt_that_cannot_fit_is_refused_before_an_adapter_is_held(
    client: httpx.AsyncClient, service: FakeService, body: dict[str, object]
) -> None:
    service.registry.add("pirate")
    response = await client.post(COMPLETIONS, json={"model": "pirate", **body})

    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert service.leases == []


async def test_ids_of_a_long_prompt_are_checked_in_the_pool(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    threads: list[threading.Thread] = []

    class Size(int):
        def __le__(self, other: int) -> bool:
            threads.append(threading.current_thread())
            return int(self) <= other

    service.card = replace(service.card, max_model_len=5000, vocab_size=Size(0x110000))
    response = await client.post(COMPLETIONS, json={"prompt": "x" * 4000})

    assert response.status_code == 200
    assert len(threads) == 1
    assert threading.main_thread() not in threads


def test_long_lists_of_numbers_are_read_by_a_function_that_lets_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = list(range(INLINE_BYTES // 4))
    seen: list[str] = []

    def integer(digits: str) -> int:
        seen.append(digits)
        return int(digits)

    monkeypatch.setattr(json_body, "_integer", integer)

    assert parse_object(json.dumps({"prompt": numbers}).encode()) == {"prompt": numbers}
    assert len(seen) == len(numbers)
    assert parse_object(b'{"prompt": [1]}') == {"prompt": [1]}
    assert len(seen) == len(numbers)


def large_answer(request: GenerationRequest) -> list[TokenEvent]:
    others = (Alternative(ord("a"), -0.25), Alternative(ord("b"), -2.5))
    events = [token_event("a", alternatives=others) for _ in range(300)]
    finish = finish_of(request, "a" * 301, 301)
    return [*events, token_event("a", alternatives=others, finish=finish)]


LOGPROBS = [
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}),
    (COMPLETIONS, {"prompt": "Hi", "logprobs": 2}),
    ("/generate", {"inputs": "Hi", "parameters": {"details": True, "return_k_alternatives": 2}}),
]


@pytest.mark.parametrize(("path", "body"), LOGPROBS)
async def test_large_answers_are_written_in_the_pool(
    client: httpx.AsyncClient,
    service: FakeService,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, object],
) -> None:
    threads: set[threading.Thread] = set()
    plain = service.tokenizer.token_text

    def token_text(token_id: int) -> str:
        threads.add(threading.current_thread())
        return plain(token_id)

    monkeypatch.setattr(service.tokenizer, "token_text", token_text)
    service.script = large_answer
    response = await client.post(path, json=body)

    assert response.status_code == 200
    assert len(response.json().get("choices", [0])) == 1
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(
    "value", [{}, [], {"a": [{"b": {"c": [{"d": [1, None, "\u2028"]}]}}]}, "x", [[[[[[1]]]]]]]
)
@pytest.mark.parametrize("depth", [0, 1, 5])
def test_json_in_pieces_is_the_same_json(value: object, depth: int) -> None:
    assert long_json_text(value, depth) == json_text(value)


async def test_writing_many_events_at_once_lets_others_have_their_turn(
    state: ServerState, service: FakeService
) -> None:
    """A reader that comes back finds a thousand tokens; everybody else's must not wait for all of them."""
    service.is_manual = True
    num_frames = 0
    at_turn: list[int] = []

    async def send(message: Message) -> None:
        nonlocal num_frames
        num_frames += message["type"] == "http.response.body"

    raw = iter([{"type": "http.request", "body": b'{"inputs": "Hi"}', "more_body": False}])

    async def receive() -> Message:
        for message in raw:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": "/generate_stream", "query_string": b"", "headers": []}
    answering = asyncio.ensure_future(build_app(state)(scope, receive, send))
    stream = await service.streams.get()
    last = token_event("a", finish=finish_of(stream.request, "a" * 1001, 1001))
    stream.put(*(token_event("a") for _ in range(1000)), last)
    while not answering.done():
        at_turn.append(num_frames)
        await asyncio.sleep(0)

    assert num_frames == 1002  # and the end of the body
    assert max(after - before for before, after in pairwise(at_turn)) <= 100


async def test_body_is_not_kept_while_its_answer_streams(port: int, service: FakeService) -> None:
    service.is_manual = True
    tracemalloc.start()
    try:
        body = {"prompt": "Hi", "stream": True, "user": "x" * 4_000_000}
        connection, stream = await begin(port, service, (COMPLETIONS, body))
        del body
        gc.collect()
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    stream.put(token_event("a", finish=finish_of(stream.request, "a", 1)))
    await connection.read_answer()
    connection.drop()

    assert most > 4_000_000
    assert held < 2_000_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"model": "pirate", "prompt": "Hi"}),
        ("/v1/messages/count_tokens", {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}),
        ("/api/generate", {"model": "pirate"}),
        ("/api/pull", {"model": "pirate"}),
    ],
    ids=["generate", "count", "load", "pull"],
)
async def test_requests_that_wait_for_adapters_are_bounded(
    make_state: Callable[..., ServerState], service: FakeService, path: str, body: dict[str, object]
) -> None:
    service.registry.add("pirate")
    service.resolving = asyncio.Event()
    state = make_state(max_preparing=2)
    async with connect(build_app(state)) as client:
        waiting = [asyncio.create_task(client.post(path, json=body)) for _ in range(2)]
        await until(lambda: service.num_resolving == 2)
        refused = await client.post(path, json=body)
        service.resolving.set()
        served = [(await task).status_code for task in waiting]
        again = await client.post(path, json=body)

    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert (served, again.status_code) == ([200, 200], 200)
    assert service.is_idle
    assert state.num_preparing == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/embed", {"model": "base", "input": ["a"] * 500_000}),
        ("/v1/embeddings", {"model": "base", "input": ["a"] * 500_000, "truncate_prompt_tokens": 4}),
        (
            "/v2/models/base/infer",
            {
                "inputs": [
                    {
                        "name": "text_input",
                        "datatype": "BYTES",
                        "shape": [500_000],
                        "data": ["a"] * 500_000,
                    }
                ]
            },
        ),
    ],
    ids=["embed", "embeddings", "infer"],
)
async def test_too_many_prompts_are_refused_before_there_is_a_record_for_each(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, object]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a prompt was made")

    for module in (ollama_embed, kserve):
        monkeypatch.setattr(module, "TextPrompt", refuse)
    monkeypatch.setattr(openai_embeddings, "replace", refuse)
    response = await client.post(path, json=body)

    assert response.status_code == 400
    assert "500000 prompts" in response.text


@pytest.mark.parametrize(
    "value", [[1, 2.5, True, "a", None, 3], [*range(2500), "x", [], {"a": [1] * 1001}], []]
)
def test_numbers_in_a_row_are_written_together(value: list[object]) -> None:
    assert long_json_text(value) == json_text(value)
