"""From a TokenStream to bytes on the wire, whole or as server-sent events, and the one place where both end.

Nothing of a stream is sent before its first events are there or the header deadline has passed: until then a
failure is a true 4xx or 5xx. Afterwards it is a frame in the protocol's own shape, and the body still ends
properly. A client that leaves is noticed by one listener on `receive`, whatever the request is doing
(resolving, queueing, head held, streaming, collecting): the work is cancelled, and on its way out
`TokenStream.close()`, a plain function, frees what it held.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence

import uvicorn
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Message, Receive, Send

from server.api.http import Exchange, log_bug
from server.api.outlet import ClientStalled, Outlet
from server.api.ports import TokenStream
from server.api.records import Choice, FrameWriter, Framing, WholeChoice
from server.errors import AnswerIncomplete, EngineFailed, InternalError, ServeError, Unavailable
from server.types import Finish, FinishReason, TokenEvent

log = logging.getLogger("motet.api")

_RETRY_AFTER_ABORT_S = 5
_MOST_LOGPROBS = 64  # tokens and alternatives that are written before the event loop gets its turn


def tame_sse_starlette() -> None:
    """Take back what importing sse-starlette does to the process, and keep its logs free of clients' words.

    It replaces uvicorn's exit handler to cut streams at the first signal (ours are drained), and it logs
    every chunk at DEBUG. Idempotent.
    """
    if uvicorn.Server.handle_exit is AppStatus.handle_exit and AppStatus.original_handler is not None:
        uvicorn.Server.handle_exit = AppStatus.original_handler  # type: ignore[method-assign]
    logging.getLogger("sse_starlette.sse").setLevel(logging.INFO)


class TokenEventSource(EventSourceResponse):
    """sse-starlette's response for frames that are ready to send: no ping, no shutdown watcher, no
    `Connection`.
    """

    def __init__(self, frames: AsyncGenerator[bytes, None], headers: dict[str, str], media_type: str) -> None:
        unbuffered = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
        super().__init__(frames, headers={**headers, **unbuffered}, media_type=media_type, ping=0, sep="\n")
        # Hop-by-hop: the HTTP server's business, doubled on HTTP/1.0 and illegal on HTTP/2.
        del self.headers["connection"]

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        await send(
            message
        )  # an Outlet, which keeps the time only where it waits: a quarter of the cost per event

    async def _listen_for_exit_signal_with_grace(self) -> None:
        await asyncio.Event().wait()  # until the response is over: draining is the service's business


async def while_connected(exchange: Exchange, work: Coroutine[None, None, None]) -> None:
    """Do the work, or stop it as soon as the client has left."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_until_disconnect(exchange.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        is_cut_off = working.cancel()  # False: it is done
        await asyncio.gather(working, watching, return_exceptions=True)
    if not is_cut_off:
        working.result()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_events(stream: TokenStream, wait_s: float) -> tuple[TokenEvent, ...]:
    """The first events, or nothing if there are none after `wait_s`.

    Raises: ServeError if they already say that the request failed: the status is still ours to choose.
    """
    try:
        async with asyncio.timeout(max(wait_s, 0)):
            events = await _next(stream)
    except TimeoutError:
        return ()
    for event in events:
        if event.finish is not None:
            _check_finish(event.finish)
    return events


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
        frames: list[bytes] = []
        try:
            if not self._slices:
                try:
                    self._accept(await anext(self._stream))
                except StopAsyncIteration:
                    raise _incomplete() from None
            elif self._has_begun:
                await asyncio.sleep(0)  # others have their turn
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
        except ServeError as error:
            self.close()
            frames.extend(self._writer.failure(error))
        except Exception as error:  # outermost frame of the answer: whatever went wrong, it gets an end
            log_bug(error, self._request_id)
            self.close()
            frames.extend(self._writer.failure(InternalError("internal error")))
        return frames

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

    def _accept(self, events: Sequence[TokenEvent]) -> None:
        whole, self._failure = events, None
        for i, event in enumerate(events):
            if event.finish is None:
                continue
            self._failure = _failure_of(event.finish)
            if self._failure is not None:
                whole = events[:i]
                break
            self._unfinished -= 1
        self._slices = deque(_slices(whole))
        self._has_begun = False


async def send_stream(
    exchange: Exchange,
    stream: TokenStream,
    first: tuple[TokenEvent, ...],
    num_choices: int,
    writer: FrameWriter,
    headers: dict[str, str],
    *,
    keep_alive_s: float,
    send_timeout_s: float,
) -> None:
    """Answer 200 with an event stream. Ends right after the last frame; a client that stalls is cut off."""
    outlet = Outlet(
        exchange.send, exchange.send_body, keep_alive_s=keep_alive_s, send_timeout_s=send_timeout_s
    )
    source = FrameSource(exchange.request_id, stream, first, num_choices, writer)
    try:
        await send_frames(exchange, _frames(source, outlet), outlet, writer.framing, headers)
    finally:
        source.close()


async def send_frames(
    exchange: Exchange,
    frames: AsyncGenerator[bytes, None],
    outlet: Outlet,
    framing: Framing,
    headers: dict[str, str],
) -> None:
    """Answer 200 with frames that are made as they are sent, and keep-alives between them."""
    comment = framing.keep_alive
    comments = None if comment is None else asyncio.create_task(outlet.keep_alive(comment))
    try:
        async with contextlib.aclosing(frames):
            await TokenEventSource(frames, headers, framing.media_type)(exchange.scope, _never, outlet.send)
    except ClientStalled:
        log.warning("request %s: the client has stopped reading; it is cut off", exchange.request_id)
    finally:
        if comments is not None:
            comments.cancel()
            await asyncio.gather(comments, return_exceptions=True)


async def collect(stream: TokenStream, num_choices: int) -> list[WholeChoice]:
    """All choices, complete. Raises: ServeError if one of them failed."""
    choices = [Choice() for _ in range(num_choices)]
    unfinished = num_choices
    while unfinished:
        for event in await _next(stream):
            choice = choices[event.index]
            if event.token is not None:
                choice.tokens.append(event.token)
            choice.prompt = event.prompt or choice.prompt
            choice.vector = event.vector or choice.vector
            if event.finish is not None:
                _check_finish(event.finish)
                choice.finish = event.finish
                unfinished -= 1
    return [
        WholeChoice(tuple(c.tokens), c.finish, c.prompt, c.vector) for c in choices if c.finish is not None
    ]


async def _frames(source: FrameSource, outlet: Outlet) -> AsyncGenerator[bytes, None]:
    try:
        while not source.is_over:
            for frame in await source.take(join=outlet.is_blocked):
                yield frame
    finally:
        source.close()


def _slices(events: Sequence[TokenEvent]) -> Iterable[Sequence[TokenEvent]]:
    """As many events at a time as are written in about a millisecond."""
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


async def _next(stream: TokenStream) -> tuple[TokenEvent, ...]:
    try:
        return await anext(stream)
    except StopAsyncIteration:
        raise _incomplete() from None


def _incomplete() -> AnswerIncomplete:
    return AnswerIncomplete("the stream ended before its answer was complete")


def _check_finish(finish: Finish) -> None:
    failure = _failure_of(finish)
    if failure is not None:
        raise failure


def _failure_of(finish: Finish) -> ServeError | None:
    if finish.reason is FinishReason.ERROR:
        return EngineFailed(finish.error or "the engine could not finish the request")
    if finish.reason is FinishReason.ABORT:
        return Unavailable(finish.error or "the request was aborted", retry_after_s=_RETRY_AFTER_ABORT_S)
    return None


async def _never() -> Message:
    """A `receive` for sse-starlette: while_connected already listens to the real one."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")
