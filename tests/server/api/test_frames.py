"""Frames leave without a task as long as their client takes them, in order and whole when it does not."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

import pytest

from server.api.frames import FrameSource, frames_through
from server.api.outlet import ClientStalled, Outlet
from server.api.records import EVENT_STREAM
from server.engine.stream import Listeners, Outbox, TokenStream
from server.errors import ServeError
from server.types import Finish, FinishReason, TokenEvent, Usage
from tests.server.api.fake_service import TIMING, token_event
from tests.server.api.raw_http import until
from tests.server.api.test_outlet import KEEP_ALIVE, Message, Transport, outlet_of


class Writer:
    """The text of each event is a frame; joined ones are one."""

    framing = EVENT_STREAM

    def frames(self, events: Sequence[TokenEvent], *, join: bool) -> Iterable[bytes]:
        texts = [event.text for event in events]
        if "bug" in texts:
            raise ValueError("a bug")
        return [text.encode() for text in (["".join(texts)] if join else texts)]

    def end(self) -> Iterable[bytes]:
        return [b"end"]

    def failure(self, error: ServeError) -> Iterable[bytes]:
        return [f"failed: {error}".encode()]


class Streamed:
    """One stream on its way to a client."""

    def __init__(self, transport: Transport, first: Sequence[TokenEvent] = (), **outlet: Any) -> None:
        self.outbox = Outbox(Listeners())
        self.num_closed = 0
        stream = TokenStream(
            "r", 3, self.outbox, on_read=_ignore, on_pause=_ignore, on_resume=_ignore, on_close=self._close,
            on_drop=_ignore,
        )  # fmt: skip
        self.outlet = outlet_of(transport, **outlet)
        self.source = FrameSource("r", stream, first, 1, Writer())
        self.yielded: list[bytes] = []
        self.task = asyncio.create_task(self._run(frames_through(self.source, self.outlet)))

    def put(self, *texts: str) -> None:
        for text in texts:
            self.outbox.put(token_event(text))

    def end(self, reason: FinishReason = FinishReason.STOP) -> None:
        usage = Usage(3, 1, 0)
        self.outbox.put(TokenEvent(0, "!", None, Finish(reason, "", usage, TIMING, seed=0, error="why")))
        self.outbox.complete()

    def _close(self) -> None:
        self.num_closed += 1
        self.outbox.close()

    async def _run(self, frames: AsyncGenerator[bytes, None]) -> None:
        """As the response does."""
        async for frame in frames:
            self.yielded.append(frame)
            await self.outlet.send({"type": "http.response.body", "body": frame, "more_body": True})


def _ignore() -> None:
    """Nobody asks."""


@pytest.fixture
async def transport() -> Transport:
    return Transport()


async def test_a_client_that_reads_needs_no_task(transport: Transport) -> None:
    streamed = Streamed(transport, [token_event("a")])
    await until(lambda: transport.bodies == [b"a"])
    streamed.put("b", "c")
    await asyncio.sleep(0)
    assert transport.bodies == [b"a", b"b", b"c"], "in the turn after, before any task that would be woken"

    streamed.end()
    await asyncio.wait_for(streamed.task, 10)
    assert transport.bodies == [b"a", b"b", b"c", b"!", b"end"]
    assert streamed.yielded == []
    assert (streamed.source.is_over, streamed.num_closed) == (True, 1)


@pytest.mark.parametrize(
    ("at_once", "written"), [("a", ["a", "de", "f"]), ("abc", ["a", "b", "c", "d", "e", "f"])]
)
async def test_what_comes_while_a_write_waits_is_kept_in_order_and_joined(
    at_once: str, written: list[str], transport: Transport
) -> None:
    streamed = Streamed(transport)
    await asyncio.sleep(0)
    transport.reads.clear()
    streamed.put(*at_once)
    await transport.waits.wait()
    streamed.put("d")
    streamed.put("e")
    for _ in range(20):
        await asyncio.sleep(0)
    assert transport.bodies == []
    transport.reads.set()
    await until(lambda: b"e" in b"".join(transport.bodies))
    streamed.put("f")
    streamed.end()
    await asyncio.wait_for(streamed.task, 10)

    assert [body.decode() for body in transport.bodies] == [*written, "!", "end"]
    rest = [text.encode() for text in at_once[1:]]
    assert streamed.yielded == rest, "of what was being written"


async def test_frames_wait_behind_a_comment_that_waits(transport: Transport) -> None:
    streamed = Streamed(transport, keep_alive_s=0.001)
    transport.reads.clear()
    comments = asyncio.create_task(streamed.outlet.keep_alive(KEEP_ALIVE))
    await transport.waits.wait()
    streamed.put("a")
    for _ in range(20):
        await asyncio.sleep(0)
    assert transport.bodies == []
    transport.reads.set()
    await until(lambda: b"a" in transport.bodies)
    comments.cancel()
    streamed.end()
    await asyncio.wait_for(streamed.task, 10)

    assert transport.bodies[0] == KEEP_ALIVE
    assert [body for body in transport.bodies if body != KEEP_ALIVE] == [b"a", b"!", b"end"]


async def test_a_client_that_stalls_ends_the_stream(transport: Transport) -> None:
    streamed = Streamed(transport, send_timeout_s=0.01)
    transport.reads.clear()
    streamed.put("a")
    with pytest.raises(ClientStalled):
        await asyncio.wait_for(streamed.task, 10)

    assert transport.was_cancelled
    assert (streamed.source.is_over, streamed.num_closed) == (True, 1)


async def test_a_comment_that_has_stalled_ends_the_stream(transport: Transport) -> None:
    streamed = Streamed(transport, keep_alive_s=0.001, send_timeout_s=0.01)
    transport.reads.clear()
    await asyncio.wait_for(streamed.outlet.keep_alive(KEEP_ALIVE), 10)
    transport.reads.set()
    streamed.put("a")

    with pytest.raises(ClientStalled):
        await asyncio.wait_for(streamed.task, 10)
    assert streamed.num_closed == 1


async def test_a_transport_that_fails_ends_the_stream() -> None:
    async def fail(message: Message) -> None:
        raise OSError("gone")

    transport = Transport()
    transport.send = fail  # type: ignore[method-assign]
    streamed = Streamed(transport)
    streamed.put("a")

    with pytest.raises(OSError, match="gone"):
        await asyncio.wait_for(streamed.task, 10)
    assert streamed.num_closed == 1


@pytest.mark.parametrize("reads", [True, False])
async def test_a_cancelled_response_closes_its_stream(transport: Transport, reads: bool) -> None:
    streamed = Streamed(transport)
    await asyncio.sleep(0)
    if not reads:
        transport.reads.clear()
    streamed.put("a")
    await until(lambda: transport.bodies == [b"a"] if reads else transport.waits.is_set())
    for _ in range(5):
        await asyncio.sleep(0)  # the response waits now
    streamed.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await streamed.task

    assert transport.was_cancelled is not reads
    assert streamed.num_closed == 1
    streamed.put("late")
    await asyncio.sleep(0)
    assert transport.bodies == ([b"a"] if reads else [])


async def test_failures_come_after_what_came_before_them(transport: Transport) -> None:
    streamed = Streamed(transport)
    streamed.put("a")
    streamed.end(FinishReason.ERROR)
    await asyncio.wait_for(streamed.task, 10)

    assert transport.bodies == [b"a", b"failed: why"]
    assert streamed.num_closed == 1


async def test_a_bug_is_an_end_too(transport: Transport) -> None:
    streamed = Streamed(transport)
    streamed.put("a")
    await until(lambda: transport.bodies == [b"a"])
    streamed.put("bug")
    await asyncio.wait_for(streamed.task, 10)

    assert transport.bodies == [b"a", b"failed: internal error"]


async def test_a_stream_that_ends_without_a_finish_is_told(transport: Transport) -> None:
    streamed = Streamed(transport)
    streamed.outbox.complete()
    await asyncio.wait_for(streamed.task, 10)

    assert transport.bodies == [b"failed: the stream ended before its answer was complete"]


async def test_many_events_at_once_are_written_in_turns(transport: Transport) -> None:
    streamed = Streamed(transport)
    await asyncio.sleep(0)
    streamed.put(*"x" * 300)
    at_turn = [0]
    while at_turn[-1] < 300:
        await asyncio.sleep(0)
        at_turn.append(len(transport.bodies))
        assert at_turn[-1] - at_turn[-2] <= 64
    streamed.put("y")
    streamed.end()
    await asyncio.wait_for(streamed.task, 10)

    assert b"".join(transport.bodies) == b"x" * 300 + b"y!end"


def test_an_outlet_says_that_a_write_waits_until_it_is_settled() -> None:
    async def check() -> None:
        transport = Transport()
        outlet: Outlet = outlet_of(transport)
        assert outlet.send_now(b"a")
        transport.reads.clear()
        assert not outlet.send_now(b"b")
        assert outlet.is_waiting
        settling = asyncio.create_task(outlet.settle())
        await asyncio.sleep(0)
        assert outlet.is_waiting
        transport.reads.set()
        await settling
        assert not outlet.is_waiting
        assert transport.bodies == [b"a", b"b"]

    asyncio.run(check())
