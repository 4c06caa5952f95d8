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
from collections.abc import AsyncGenerator, Coroutine

import uvicorn
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Message, Receive, Send

from server.api.frames import FrameSource, failure_of, frames_through, incomplete
from server.api.http import Exchange
from server.api.outlet import ClientStalled, Outlet
from server.api.ports import TokenStream
from server.api.records import Choice, FrameWriter, Framing, WholeChoice
from server.types import Finish, TokenEvent

log = logging.getLogger("motet.api")


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
    outlet = Outlet(exchange, keep_alive_s=keep_alive_s, send_timeout_s=send_timeout_s)
    source = FrameSource(exchange.request_id, stream, first, num_choices, writer)
    try:
        await send_frames(exchange, frames_through(source, outlet), outlet, writer.framing, headers)
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


async def _next(stream: TokenStream) -> tuple[TokenEvent, ...]:
    try:
        return await anext(stream)
    except StopAsyncIteration:
        raise incomplete() from None


def _check_finish(finish: Finish) -> None:
    failure = failure_of(finish)
    if failure is not None:
        raise failure


async def _never() -> Message:
    """A `receive` for sse-starlette: while_connected already listens to the real one."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")
