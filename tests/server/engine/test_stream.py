"""The reader's side of a request: everything pending at once, one end, no reader left waiting."""

import asyncio
import gc

import pytest

from server.engine.stream import Listeners, Outbox, TokenStream
from server.types import TokenEvent


class Calls:
    """Counts what a stream tells its owner, and closes the outbox as the owner would."""

    def __init__(self) -> None:
        self.outbox = Outbox(Listeners())
        self.reads = self.closes = self.drops = 0
        self.pauses: list[str] = []

    def stream(self) -> TokenStream:
        return TokenStream(
            "r",
            3,
            self.outbox,
            on_read=self.read,
            on_pause=lambda: self.pauses.append("pause"),
            on_resume=lambda: self.pauses.append("resume"),
            on_close=self.close,
            on_drop=self.drop,
        )

    def read(self) -> None:
        self.reads += 1

    def close(self) -> None:
        self.closes += 1
        self.outbox.close()

    def drop(self) -> None:
        self.drops += 1


def event(text: str) -> TokenEvent:
    return TokenEvent(0, text)


async def test_a_batch_is_everything_that_is_pending() -> None:
    calls = Calls()
    stream = calls.stream()
    for text in "abc":
        calls.outbox.put(event(text))
    assert [e.text for e in await anext(stream)] == ["a", "b", "c"]
    assert calls.outbox.num_pending == 0
    assert calls.reads == 1
    stream.close()


async def test_a_waiting_reader_gets_all_events_of_a_step_in_one_batch() -> None:
    calls = Calls()
    stream = calls.stream()
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)  # the reader waits now
    calls.outbox.put(event("a"))
    calls.outbox.put(event("b"))
    assert len(await reading) == 2
    stream.close()


async def test_a_complete_stream_ends_after_what_is_pending() -> None:
    calls = Calls()
    stream = calls.stream()
    calls.outbox.put(event("a"))
    calls.outbox.complete()
    assert [len(batch) async for batch in stream] == [1]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_completion_wakes_a_waiting_reader() -> None:
    calls = Calls()
    stream = calls.stream()
    reading = asyncio.ensure_future(anext(stream, None))
    await asyncio.sleep(0)
    calls.outbox.complete()
    assert await reading is None


async def test_close_is_idempotent_and_ends_a_read_under_way() -> None:
    calls = Calls()
    stream = calls.stream()
    reading = asyncio.ensure_future(anext(stream, None))
    await asyncio.sleep(0)
    stream.close()
    stream.close()
    assert await reading is None
    assert calls.closes == 1
    calls.outbox.put(event("late"))
    assert calls.outbox.num_pending == 0


async def test_a_cancelled_read_loses_nothing() -> None:
    calls = Calls()
    stream = calls.stream()
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    calls.outbox.put(event("a"))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert [e.text for e in await anext(stream)] == ["a"]
    stream.close()


async def test_a_stream_that_is_dropped_tells_its_owner() -> None:
    calls = Calls()
    stream = calls.stream()
    del stream
    gc.collect()
    assert (calls.drops, calls.closes) == (1, 0)


async def test_a_stream_that_was_closed_or_read_to_its_end_tells_nobody_again() -> None:
    calls = Calls()
    closed = calls.stream()
    closed.close()
    read = calls.stream()
    assert [batch async for batch in read] == []
    del closed, read
    gc.collect()
    assert (calls.drops, calls.closes) == (0, 1)


async def test_pause_and_resume_reach_the_owner_until_the_stream_is_over() -> None:
    calls = Calls()
    stream = calls.stream()
    stream.pause()
    stream.resume()
    stream.close()
    stream.pause()
    stream.resume()
    assert calls.pauses == ["pause", "resume"]


async def test_a_listener_is_called_once_for_all_that_is_put_before_it_runs() -> None:
    calls = Calls()
    stream = calls.stream()
    taken: list[tuple[TokenEvent, ...] | None] = []
    stream.listen(lambda: taken.append(stream.take()))
    calls.outbox.put(event("a"))
    calls.outbox.put(event("b"))
    assert taken == [], "not from within"
    await asyncio.sleep(0)
    calls.outbox.put(event("c"))
    await asyncio.sleep(0)

    assert taken == [(event("a"), event("b")), (event("c"),)]
    assert calls.reads == 2
    stream.close()


async def test_who_begins_to_listen_hears_of_what_was_there_before() -> None:
    calls = Calls()
    stream = calls.stream()
    taken: list[tuple[TokenEvent, ...] | None] = []
    assert stream.take() == ()
    calls.outbox.put(event("a"))
    calls.outbox.complete()
    stream.listen(lambda: taken.append(stream.take()))
    await asyncio.sleep(0)
    assert taken == [(event("a"),)]

    stream.listen(lambda: taken.append(stream.take()))
    await asyncio.sleep(0)
    assert taken == [(event("a"),), None], "the end is told again"


async def test_who_does_not_listen_any_more_is_not_called() -> None:
    calls = Calls()
    stream = calls.stream()
    calls.outbox.put(event("a"))
    stream.listen(lambda: pytest.fail("nobody listens"))
    stream.listen(None)
    calls.outbox.put(event("b"))
    await asyncio.sleep(0)

    assert len(await anext(stream)) == 2
    stream.close()


async def test_close_and_completion_are_told() -> None:
    for end in ("complete", "close"):
        calls = Calls()
        stream = calls.stream()
        taken: list[tuple[TokenEvent, ...] | None] = []
        stream.listen(lambda stream=stream, taken=taken: taken.append(stream.take()))  # type: ignore[misc]
        getattr(calls.outbox, end)()
        await asyncio.sleep(0)
        assert taken == [None]
        stream.close()


async def test_listeners_of_many_streams_are_called_in_one_go_and_in_order() -> None:
    loop, turns, called = asyncio.get_running_loop(), [0], list[tuple[int, str]]()
    listeners = Listeners()
    for name in "abc":
        listeners.call_soon(lambda name=name: called.append((turns[0], name)))  # type: ignore[misc]
    loop.call_soon(lambda: turns.__setitem__(0, 1))
    listeners.call_soon(lambda: called.append((turns[0], "d")))
    assert not called
    await asyncio.sleep(0)
    assert called == [(0, "a"), (0, "b"), (0, "c"), (0, "d")]


async def test_a_listener_that_raises_takes_nothing_from_the_others() -> None:
    loop, errors, called = asyncio.get_running_loop(), list[str](), list[str]()
    loop.set_exception_handler(lambda _, context: errors.append(repr(context.get("exception"))))
    listeners = Listeners()
    listeners.call_soon(lambda: called.append("a"))
    listeners.call_soon(lambda: called.extend(1 // 0))  # type: ignore[arg-type]
    listeners.call_soon(lambda: called.append("b"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert called == ["a", "b"]
    assert errors == ["ZeroDivisionError('integer division or modulo by zero')"]
