"""Streams over a real port: when the head leaves, what is said in silence, how streams end, and who is let go
when.

Rows C15, C19, L12, L19, U1, U2, Z8, Z9, Z10, D7 to D9.
"""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sse_starlette import sse

from server.api.app import build_app
from server.api.state import ServerState
from server.errors import Overloaded
from server.types import FinishReason, TokenEvent
from tests.server.api.conftest import CHAT, GENERATE, WHOLE_CHAT, begin, serve
from tests.server.api.fake_service import FakeService, FakeStream, finish_of, token_event
from tests.server.api.raw_http import Connection, ask, post

MakeState = Callable[..., ServerState]

KEEP_ALIVE = b": keep-alive\n\n"


def end(stream: FakeStream, text: str = "!", **finish: Any) -> TokenEvent:
    return token_event(text, finish=finish_of(stream.request, text, 1, **finish))


def failure(stream: FakeStream, reason: FinishReason, error: str) -> TokenEvent:
    return TokenEvent(0, "", None, finish_of(stream.request, "", 0, reason=reason, error=error))


async def is_silent(connection: Connection) -> bool:
    """Whether nothing has come, as far as a whole round of both sides can tell."""
    for _ in range(50):
        await asyncio.sleep(0)
    return not connection.reader._buffer  # type: ignore[attr-defined]


async def test_head_waits_for_the_first_token_and_frames_come_one_by_one(
    port: int, manual: FakeService
) -> None:
    """Z10, D2: and the last frame is followed by the end of the body at once."""
    connection, stream = await begin(port, manual, CHAT)
    assert await is_silent(connection)

    stream.put(token_event("One"))
    answer = await connection.read_head()
    assert (answer.status, answer.header("transfer-encoding")) == (200, "chunked")
    assert b'"content":"One"' in await connection.read_chunk()
    assert await is_silent(connection)

    stream.put(token_event(" two"))
    assert b'"content":" two"' in await connection.read_chunk()
    assert await is_silent(connection)

    stream.put(end(stream))
    rest = [await connection.read_chunk() for _ in range(4)]
    assert b'"generated_text"' in rest[1]
    assert rest[2:] == [b"data: [DONE]\n\n", b""]
    assert manual.is_idle
    connection.drop()


@pytest.mark.parametrize(
    "route",
    [
        CHAT,
        ("/v1/completions", {"prompt": "Hi", "stream": True}),
        GENERATE,
        ("/", {"inputs": "Hi", "stream": True}),
        ("/api/jobs/base/infer/stream", {"prompt": "Hi"}),
        ("/v2/models/base/generate_stream", {"text_input": "Hi"}),
        ("/api/generate", {"model": "base", "prompt": "Hi"}),
        ("/api/chat", {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}),
    ],
    ids=lambda route: str(route[0]),
)
async def test_frames_of_every_protocol_come_with_their_tokens(
    port: int, manual: FakeService, route: tuple[str, Any]
) -> None:
    """J1, K2, C7, C10, L1, L15, Z1: each has come before there is a next token, and the end comes at once."""
    connection, stream = await begin(port, manual, route)
    for text in ("One", " two", " three"):
        stream.put(token_event(text))
        if text == "One":
            assert (await connection.read_head()).status == 200
        assert f'"{text}"'.encode() in await connection.read_chunk()
        assert await is_silent(connection)

    stream.put(end(stream))
    last = [chunk async for chunk in _chunks(connection)]
    assert b"".join(last).endswith(b"\n")
    assert await is_silent(connection)
    assert manual.is_idle
    connection.drop()


@pytest.mark.parametrize(
    ("route", "status"),
    [
        (CHAT, 500),
        (GENERATE, 424),
        (("/v1/completions", {"prompt": "Hi"}), 500),
        (("/generate", {"inputs": "Hi"}), 424),
    ],
)
async def test_failure_before_the_first_token_is_a_true_error(
    port: int, manual: FakeService, route: tuple[str, Any], status: int
) -> None:
    connection, stream = await begin(port, manual, route)
    stream.put(failure(stream, FinishReason.ERROR, "out of luck"))
    answer = await connection.read_answer()

    assert answer.status == status
    assert "out of luck" in answer.body.decode()
    assert manual.is_idle
    connection.drop()


@pytest.mark.parametrize("route", [CHAT, GENERATE])
async def test_abort_before_the_first_token_is_503_with_retry_after(
    port: int, manual: FakeService, route: tuple[str, Any]
) -> None:
    connection, stream = await begin(port, manual, route)
    stream.put(failure(stream, FinishReason.ABORT, "the server is shutting down"))
    answer = await connection.read_answer()

    assert answer.status == 503
    assert int(answer.header("retry-after") or 0) >= 1
    assert manual.is_idle
    connection.drop()


@pytest.mark.parametrize(("route", "kind"), [(CHAT, "rate_limit_error"), (GENERATE, "overloaded")])
async def test_full_queue_is_429_with_retry_after(
    port: int, service: FakeService, route: tuple[str, Any], kind: str
) -> None:
    service.registry.add("pirate")
    service.refusal = Overloaded("the queue is full", retry_after_s=7)
    body = {**route[1], "model": "pirate", "parameters": {"adapter_id": "pirate"}}
    answer = await ask(port, post(route[0], body))

    assert (answer.status, answer.header("retry-after")) == (429, "7")
    assert kind in answer.body.decode()
    assert service.is_idle


@pytest.mark.parametrize("route", [CHAT, GENERATE])
async def test_C15_L19_head_leaves_at_the_deadline_and_comments_fill_the_silence(
    make_state: MakeState, manual: FakeService, route: tuple[str, Any]
) -> None:
    """Z10. Beyond the deadline in the queue: first the head, then comments, then tokens, comments again."""
    async with serve(build_app(make_state(header_deadline_s=0.01, keep_alive_s=0.02))) as port:
        connection, stream = await begin(port, manual, route)
        assert (await connection.read_head()).status == 200
        assert [await connection.read_chunk() for _ in range(3)] == [KEEP_ALIVE] * 3

        stream.put(token_event("One"))
        while (chunk := await connection.read_chunk()) == KEEP_ALIVE:
            pass
        assert b"One" in chunk
        assert await connection.read_chunk() == KEEP_ALIVE

        stream.put(end(stream))
        frames = [chunk async for chunk in _chunks(connection) if chunk != KEEP_ALIVE]
        assert b'"generated_text":"!"' in b"".join(frames)
        connection.drop()
    assert manual.is_idle


async def _chunks(connection: Connection) -> Any:
    while chunk := await connection.read_chunk():
        yield chunk


@pytest.mark.parametrize(("route", "param"), [(CHAT, "model"), (GENERATE, None)])
async def test_C19_adapter_that_is_not_ready_by_the_deadline_is_503(
    make_state: MakeState, service: FakeService, route: tuple[str, Any], param: str | None
) -> None:
    """Also for answers that are not streamed; no head leaves before the adapter is there."""
    service.resolving = asyncio.Event()
    async with serve(build_app(make_state(header_deadline_s=0.05))) as port:
        answers = [await ask(port, post(route[0], {**route[1], "stream": s})) for s in (True, False)]

    for answer in answers:
        assert answer.status == 503
        assert int(answer.header("retry-after") or 0) >= 1
        error = json.loads(answer.body)["error"]
        assert error["param"] == param if param else "still being loaded" in error
    assert service.is_idle


@pytest.mark.parametrize(
    ("route", "last"),
    [
        (
            CHAT,
            [
                b'data: {"error":{"message":"shutting down","type":"server_error","param":null,'
                b'"code":"unavailable"}}\n\n',
                b"data: [DONE]\n\n",
            ],
        ),
        (GENERATE, [b'data: {"error":"shutting down","error_type":"unavailable"}\n\n']),
    ],
)
async def test_L12_U2_abort_in_a_stream_is_an_error_frame_and_a_proper_end(
    port: int, manual: FakeService, route: tuple[str, Any], last: list[bytes]
) -> None:
    connection, stream = await begin(port, manual, route)
    stream.put(token_event("One"))
    await connection.read_head()
    await connection.read_chunk()
    stream.put(token_event(" two"), failure(stream, FinishReason.ABORT, "shutting down"))

    assert b" two" in await connection.read_chunk()
    assert [await connection.read_chunk() for _ in range(len(last) + 1)] == [*last, b""]
    assert manual.is_idle
    connection.drop()


@pytest.mark.parametrize("route", [CHAT, GENERATE])
async def test_stream_that_ends_without_a_finish_says_so(
    port: int, manual: FakeService, route: tuple[str, Any]
) -> None:
    connection, stream = await begin(port, manual, route)
    stream.put(token_event("One"))
    await connection.read_head()
    await connection.read_chunk()
    stream.end_without_finish()

    said = b"Incomplete generation" if route is GENERATE else b"before its answer was complete"
    assert said in await connection.read_chunk()
    assert manual.is_idle
    connection.drop()


async def test_bug_in_a_stream_is_an_error_frame_without_its_text(
    port: int, manual: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    connection, stream = await begin(port, manual, CHAT)
    stream.put(token_event("One"))
    await connection.read_head()
    await connection.read_chunk()
    stream.failure = ValueError("the user's words")
    stream.put()

    assert b'"message":"internal error"' in await connection.read_chunk()
    assert [await connection.read_chunk(), await connection.read_chunk()] == [b"data: [DONE]\n\n", b""]
    assert "ValueError" in caplog.text
    assert "words" not in caplog.text
    assert manual.is_idle
    connection.drop()


async def test_one_failed_choice_ends_the_stream_of_all(port: int, manual: FakeService) -> None:
    connection, stream = await begin(port, manual, (CHAT[0], {**CHAT[1], "n": 2}))
    stream.put(token_event("a"), token_event("b", index=1))
    await connection.read_head()
    for _ in range(2):
        await connection.read_chunk()
    finish = finish_of(stream.request, "b", 1, reason=FinishReason.ERROR, error="broken")
    stream.put(TokenEvent(1, "", None, finish), token_event("never shown"))

    chunks = [chunk async for chunk in _chunks(connection)]
    assert b"broken" in chunks[0]
    assert chunks[1:] == [b"data: [DONE]\n\n"]
    assert manual.is_idle
    connection.drop()


async def test_U1_connection_can_be_used_again_after_a_stream(port: int, service: FakeService) -> None:
    connection = await Connection.open(port)
    for _ in range(3):
        for route in (CHAT, GENERATE, WHOLE_CHAT):
            await connection.send(post(*route))
            assert (await connection.read_answer()).status == 200
    assert service.is_idle
    connection.drop()


async def test_streams_start_no_shutdown_watcher(port: int, service: FakeService) -> None:
    """T19: sse-starlette's polls twice a second and cuts streams at the first signal."""
    await ask(port, post(*CHAT))

    assert sse._get_shutdown_state().events == set()
    assert not sse._get_shutdown_state().watcher_started


async def test_health_answers_while_a_prompt_is_tokenised(port: int, service: FakeService) -> None:
    """J14's rule for this layer: long texts leave the event loop alone."""
    encode = service.tokenizer.encode
    began = asyncio.Event()
    go_on = threading.Event()
    loop = asyncio.get_running_loop()

    def slow_encode(text: str, **options: bool) -> list[int]:
        loop.call_soon_threadsafe(began.set)
        go_on.wait(10)  # in the pool: what a very long text takes
        return encode(text, **options)

    service.tokenizer.encode = slow_encode  # type: ignore[method-assign]
    asking = asyncio.create_task(ask(port, post("/v1/completions", {"prompt": "x" * 3500})))
    await asyncio.wait_for(began.wait(), 10)
    health = await ask(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")

    assert health.status == 200
    assert not asking.done()
    go_on.set()
    assert (await asking).status == 400  # it was too long after all
