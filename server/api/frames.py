"""From a stream's events to its frames, and how frames leave without a task of their own.

A token's way out is short as long as its client takes what is written at once, as nearly every client nearly
always does: the event loop calls, events become frames, frames are written. Only where a write has to wait
does the rest go to whoever may wait: the generator that the HTTP response reads.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence

from server.api.http import log_bug
from server.api.outlet import Outlet
from server.api.ports import TokenStream
from server.api.records import FrameWriter
from server.errors import AnswerIncomplete, EngineFailed, InternalError, ServeError, Unavailable
from server.types import Finish, FinishReason, TokenEvent

_RETRY_AFTER_ABORT_S = 5
_MOST_LOGPROBS = 64  # tokens and alternatives that are written before the event loop gets its turn


class FrameSource:
    """Turns a stream's events into frames, up to its end, which may be a failure.

    A `take` that is cancelled loses nothing: the next one goes on where it stopped.
    """

    def __init__(
        self,
        request_id: str,
        stream: TokenStream,
        first: Sequence[TokenEvent],
        num_choices: int,
        writer: FrameWriter,
    ) -> None:
        """`first`: what has been taken from the stream already."""
        self.is_over = False
        self._request_id = request_id
        self._stream = stream
        self._writer = writer
        self._unfinished = num_choices
        self._slices: deque[Sequence[TokenEvent]] = deque()  # of the events that were taken last
        self._has_begun = False  # with them
        self._failure: ServeError | None = None  # after them
        self._accept(first)

    async def take(self, *, join: bool) -> list[bytes]:
        """The next frames, as soon as there are events; they may complete none. Only while not `is_over`."""
        events: Sequence[TokenEvent] | None = ()
        if not self._slices:
            try:
                events = await anext(self._stream)
            except StopAsyncIteration:
                events = None
            except Exception as error:
                return list(self._fail(error))
        elif self._has_begun:
            await asyncio.sleep(0)  # others have their turn
        return self._write(events, join)

    def take_now(self, *, join: bool) -> list[bytes]:
        """The same of what is there, which may be nothing."""
        try:
            events = () if self._slices else self._stream.take()
            if events is not None and len(events) == 1 and events[0].finish is None:
                return list(self._writer.frames(events, join=join))  # as nearly always
        except Exception as error:
            return list(self._fail(error))
        return self._write(events, join)

    @property
    def has_more(self) -> bool:
        """Whether frames are left that others have their turn before."""
        return bool(self._slices)

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Have it called when events can be taken, or the end has come; None: no more."""
        self._stream.listen(listener)

    def pause(self) -> None:
        """No more events for now."""
        self._stream.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._stream.resume()

    def close(self) -> None:
        """End what still runs. Synchronous and idempotent."""
        self.is_over = True
        self._stream.close()

    def _write(self, events: Sequence[TokenEvent] | None, join: bool) -> list[bytes]:
        """The frames of a slice: of these events, if there was none left. None: there are no more."""
        frames: list[bytes] = []
        try:
            if events is None:
                raise incomplete()
            if events:
                self._accept(events)
            self._has_begun = True
            if self._slices:
                for frame in self._writer.frames(self._slices.popleft(), join=join):
                    frames.append(frame)  # one by one: what comes before a failure counts
            if not self._slices:
                if self._failure is not None:
                    raise self._failure
                if self._unfinished == 0:
                    frames.extend(self._writer.end())
                    self.close()
        except Exception as error:
            frames.extend(self._fail(error))
        return frames

    def _fail(self, error: Exception) -> Iterable[bytes]:
        """Whatever went wrong, the answer gets an end."""
        self.close()
        if not isinstance(error, ServeError):
            log_bug(error, self._request_id)
            error = InternalError("internal error")
        return self._writer.failure(error)

    def _accept(self, events: Sequence[TokenEvent]) -> None:
        whole, self._failure = events, None
        for i, event in enumerate(events):
            if event.finish is None:
                continue
            self._failure = failure_of(event.finish)
            if self._failure is not None:
                whole = events[:i]
                break
            self._unfinished -= 1
        self._slices = deque(_slices(whole))
        self._has_begun = False


async def frames_through(source: FrameSource, outlet: Outlet) -> AsyncGenerator[bytes, None]:
    """Send the frames as they come, and yield those that come after a write that has to wait."""
    try:
        while not source.is_over:
            for frame in await _push(source, outlet):
                yield frame
    finally:
        source.close()


async def _push(source: FrameSource, outlet: Outlet) -> list[bytes]:
    """Write frames as they come, up to the end, or until one cannot be written at once: those after it."""
    loop = asyncio.get_running_loop()
    left: asyncio.Future[list[bytes]] = loop.create_future()
    is_listening = False

    def write() -> None:
        nonlocal is_listening
        if left.done():
            return
        if outlet.is_waiting:
            left.set_result([])
            return
        frames = source.take_now(join=outlet.is_blocked)
        for i, frame in enumerate(frames, 1):
            if not outlet.send_now(frame):
                left.set_result(frames[i:])
                return
        if source.is_over:
            left.set_result([])
        elif source.has_more:  # others have their turn
            source.listen(None)
            is_listening = False
            loop.call_soon(write_or_fail)
        elif not is_listening:
            is_listening = True
            source.listen(write_or_fail)

    def write_or_fail() -> None:
        try:
            write()
        except Exception as error:
            left.set_exception(error)

    try:
        write_or_fail()
        rest = await left
    finally:
        source.listen(None)
    await outlet.settle()
    return rest


def incomplete() -> AnswerIncomplete:
    return AnswerIncomplete("the stream ended before its answer was complete")


def failure_of(finish: Finish) -> ServeError | None:
    """What a client is told of an end that is none of an answer; None for one that is."""
    if finish.reason is FinishReason.ERROR:
        return EngineFailed(finish.error or "the engine could not finish the request")
    if finish.reason is FinishReason.ABORT:
        return Unavailable(finish.error or "the request was aborted", retry_after_s=_RETRY_AFTER_ABORT_S)
    return None


def _slices(events: Sequence[TokenEvent]) -> Iterable[Sequence[TokenEvent]]:
    """As many events at a time as are written in about a millisecond."""
    if not events:
        return ()
    return (events,) if len(events) == 1 else _cut(events)


def _cut(events: Sequence[TokenEvent]) -> Iterator[Sequence[TokenEvent]]:
    start = size = 0
    for i, event in enumerate(events):
        size += 1 if event.token is None else 1 + len(event.token.alternatives)
        size += sum(1 + len(token.alternatives) for token in event.prompt)
        if size >= _MOST_LOGPROBS:
            yield events[start : i + 1]
            start, size = i + 1, 0
    if start < len(events):
        yield events[start:]
