"""The outlet by itself, and what a slow reader changes: OpenAI chunks are joined, LoRAX frames never are. Row
Z8, D8.
"""

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest
from starlette.types import Send

from server.api.app import build_app
from server.api.http import Exchange
from server.api.outlet import ClientStalled, Outlet
from server.api.state import ServerState
from tests.server.api.fake_service import FakeService, finish_of, token_event
from tests.server.api.raw_http import until

Message = MutableMapping[str, Any]
FRAME: Message = {"type": "http.response.body", "body": b"frame", "more_body": True}
LAST: Message = {"type": "http.response.body", "body": b"", "more_body": False}

KEEP_ALIVE = b": keep-alive\n\n"


class Transport:
    """A client that reads only while `reads` is set."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self.waits = asyncio.Event()  # somebody waits for the client
        self.messages: list[Message] = []
        self.was_cancelled = False

    @property
    def bodies(self) -> list[bytes]:
        return [m["body"] for m in self.messages if m["type"] == "http.response.body" and m["body"]]

    async def send(self, message: Message) -> None:
        if not self.reads.is_set():
            self.waits.set()
            try:
                await self.reads.wait()
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise
        self.messages.append(message)


@pytest.fixture
async def transport() -> Transport:
    return Transport()


def exchange_by(send: Send, /, **scope: object) -> Exchange:
    """With a client whose messages go there; of a server that knows nothing else, unless `scope` says so."""
    return Exchange({f"motet.{name}": value for name, value in scope.items()}, _never, send)


async def _never() -> Message:
    raise AssertionError("nothing is read here")


def outlet_of(transport: Transport, keep_alive_s: float = 60, send_timeout_s: float = 60) -> Outlet:
    return Outlet(exchange_by(transport.send), keep_alive_s=keep_alive_s, send_timeout_s=send_timeout_s)


async def test_a_frame_leaves_without_a_message_where_the_server_can(transport: Transport) -> None:
    written: list[bytes] = []
    can_write = True

    def write(body: bytes) -> bool:
        if can_write:
            written.append(body)
        return can_write

    outlet = Outlet(exchange_by(transport.send, write=write), keep_alive_s=60, send_timeout_s=60)
    assert outlet.send_now(b"at once")
    can_write = False
    assert outlet.send_now(b"as a message")

    assert written == [b"at once"]
    assert transport.bodies == [b"as a message"]
    assert not outlet.is_blocked


async def test_write_that_goes_through_at_once_is_not_blocked(transport: Transport) -> None:
    outlet = outlet_of(transport)
    await outlet.send(FRAME)

    assert not outlet.is_blocked
    assert transport.bodies == [b"frame"]


async def test_only_the_first_message_is_a_head(transport: Transport) -> None:
    heads = Transport()
    outlet = Outlet(exchange_by(heads.send, send=transport.send), keep_alive_s=60, send_timeout_s=60)
    start: Message = {"type": "http.response.start", "status": 200, "headers": []}
    for message in (start, FRAME, LAST):
        await outlet.send(message)

    assert heads.messages == [start]
    assert transport.messages == [FRAME, LAST]


async def test_write_that_waits_for_the_client_is_remembered_until_the_next(transport: Transport) -> None:
    outlet = outlet_of(transport)
    transport.reads.clear()
    writing = asyncio.create_task(outlet.send(FRAME))
    await transport.waits.wait()
    transport.reads.set()
    await writing
    assert outlet.is_blocked

    await outlet.send(FRAME)
    assert not outlet.is_blocked
    assert transport.bodies == [b"frame", b"frame"]


async def test_client_that_never_reads_is_given_up(transport: Transport) -> None:
    transport.reads.clear()
    with pytest.raises(ClientStalled):
        await outlet_of(transport, send_timeout_s=0.01).send(FRAME)

    assert transport.was_cancelled


async def test_cancelled_write_cancels_the_transports_wait(transport: Transport) -> None:
    transport.reads.clear()
    writing = asyncio.create_task(outlet_of(transport).send(FRAME))
    await transport.waits.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing

    assert transport.was_cancelled


async def test_failing_transport_fails_the_write(transport: Transport) -> None:
    async def fail_later(message: Message) -> None:
        await asyncio.sleep(0)
        raise OSError("gone")

    async def fail(message: Message) -> None:
        raise OSError("gone")

    for send in (fail, fail_later):
        with pytest.raises(OSError, match="gone"):
            await Outlet(exchange_by(send), keep_alive_s=60, send_timeout_s=60).send(FRAME)


async def test_comments_stop_with_the_last_message(transport: Transport) -> None:
    outlet = outlet_of(transport, keep_alive_s=0.001)
    comments = asyncio.create_task(outlet.keep_alive(KEEP_ALIVE))
    await until(lambda: transport.bodies.count(KEEP_ALIVE) > 1)
    await outlet.send(LAST)
    await asyncio.wait_for(comments, 10)

    assert transport.messages[-1] == LAST


async def test_comment_that_stalls_fails_the_next_write(transport: Transport) -> None:
    outlet = outlet_of(transport, keep_alive_s=0.001, send_timeout_s=0.01)
    transport.reads.clear()
    await asyncio.wait_for(outlet.keep_alive(KEEP_ALIVE), 10)
    transport.reads.set()

    with pytest.raises(ClientStalled):
        await outlet.send(FRAME)


async def test_comment_never_lands_inside_a_write(transport: Transport) -> None:
    """Both wait for the same client; what was first is written first, whole."""
    outlet = outlet_of(transport, keep_alive_s=0.001)
    transport.reads.clear()
    writing = asyncio.create_task(outlet.send(FRAME))
    await transport.waits.wait()
    comments = asyncio.create_task(outlet.keep_alive(KEEP_ALIVE))
    await asyncio.sleep(0.005)
    transport.reads.set()
    await writing
    comments.cancel()

    assert transport.bodies[0] == b"frame"


async def stream_to_slow_client(
    state: ServerState, service: FakeService, path: str, body: dict[str, Any], num_writes: int
) -> list[bytes]:
    """One token is read, then four come while the client does not read; when these have become `num_writes`
    writes in all, a last one comes.
    """
    transport = Transport()
    service.is_manual = True
    raw = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> Message:
        try:
            return next(raw)
        except StopIteration:
            await asyncio.Event().wait()
            raise

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
    answering = asyncio.ensure_future(build_app(state)(scope, receive, transport.send))
    stream = await service.streams.get()
    stream.put(token_event("0"))
    await until(lambda: bool(transport.bodies))
    transport.reads.clear()
    stream.put(token_event("1"))
    await transport.waits.wait()
    stream.put(*(token_event(piece) for piece in "234"))
    transport.reads.set()
    await until(lambda: len(transport.bodies) == num_writes)
    stream.put(token_event("5", finish=finish_of(stream.request, "012345", 6)))
    await asyncio.wait_for(answering, 10)
    assert service.is_idle
    return transport.bodies


async def test_openai_chunks_are_joined_while_the_client_is_slow(
    state: ServerState, service: FakeService
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    frames = await stream_to_slow_client(state, service, "/v1/chat/completions", body, 3)
    chunks = [json.loads(frame.removeprefix(b"data: ")) for frame in frames[:-1]]

    contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert contents == ["0", "1", "234", "5", None]


async def test_lorax_frames_are_one_per_token_also_for_a_slow_client(
    state: ServerState, service: FakeService
) -> None:
    frames = await stream_to_slow_client(state, service, "/generate_stream", {"inputs": "Hi"}, 5)

    assert [json.loads(frame.removeprefix(b"data: "))["token"]["text"] for frame in frames] == list("012345")
