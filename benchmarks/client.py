"""Sends one request and times its answer as the bytes arrive.

A chunk's time is taken once, when the read returns and before anything is parsed, so that events which
arrived together have one time. The answer counts as good only if the server ended it: a stream that just
stops is a failure of kind "cut off", however many tokens it brought.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

import aiohttp

from benchmarks.dialects import DONE, Dialect, dialect_of, error_text
from benchmarks.records import Shot, Target, Wire, Wish
from benchmarks.sse import SseParser

READ_BYTES = 2**20  # aiohttp stops reading the socket above twice this: far beyond what one answer brings
MESSAGE_CHARACTERS = 200


class Client:
    """Knows one server and one dialect. `send` never raises for what the server or the network does."""

    def __init__(self, session: aiohttp.ClientSession, target: Target, wire: Wire) -> None:
        self._session = session
        self._target = target
        self._dialect: Dialect = dialect_of(wire)

    async def send(self, wish: Wish) -> Shot:
        body = json.dumps(self._dialect.body(wish, self._target.model)).encode()
        sent = perf_counter()
        shot = Shot(
            adapter=wish.adapter, scheduled=sent if wish.scheduled is None else wish.scheduled, sent=sent
        )
        try:
            await self._exchange(body, shot)
        except TimeoutError:
            _fail(shot, "timeout", "no complete answer in time")
        except aiohttp.ClientConnectorError as error:
            _fail(shot, "no connection", str(error))
        except (aiohttp.ClientError, OSError) as error:
            _fail(shot, "disconnected", f"{type(error).__name__}: {error}")
        shot.done = perf_counter()
        return shot

    async def _exchange(self, body: bytes, shot: Shot) -> None:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        url = self._target.url + self._dialect.path
        async with self._session.post(url, data=body, headers=headers) as response:
            if response.status != 200:
                _fail(shot, f"http {response.status}", _message(await response.text(errors="replace")))
                return
            if response.content_type != "text/event-stream":
                _fail(shot, "not a stream", f"the answer is {response.content_type}")
                return
            await self._read(response.content.iter_any(), shot)
        if shot.failure is None and shot.finish is None:
            _fail(shot, "cut off", "the stream ended without a finish reason")
        elif shot.failure is None and not shot.tokens:
            _fail(shot, "no output", "the answer has no tokens")

    async def _read(self, chunks: AsyncIterator[bytes], shot: Shot) -> None:
        """Take events off the stream until its end or [DONE]."""
        parser = SseParser()
        async for chunk in chunks:
            now = perf_counter()
            for data in parser.feed(chunk):
                if data == DONE:
                    shot.finish = shot.finish or "unknown"
                    return
                self._take(data, now, shot)

    def _take(self, data: bytes, now: float, shot: Shot) -> None:
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            _fail(shot, "bad frame", data[:MESSAGE_CHARACTERS].decode(errors="replace"))
            return
        frame = self._dialect.read(event)
        if frame.error is not None:
            _fail(shot, "stream error", frame.error)
        if frame.has_output:
            if shot.last is None:
                shot.first = now
            else:
                shot.gaps.append(now - shot.last)
            shot.last = now
            shot.chunks += 1
        shot.finish = frame.finish or shot.finish
        if frame.output_tokens is not None:
            shot.output_tokens = frame.output_tokens
        if frame.prompt_tokens is not None:
            shot.prompt_tokens = frame.prompt_tokens
        if frame.cached_tokens is not None:
            shot.cached_tokens = frame.cached_tokens


@asynccontextmanager
async def open_session(wire: Wire) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without a limit on connections: a queue inside the client would hide what it measures."""
    connector = aiohttp.TCPConnector(limit=0, force_close=not wire.keeps_alive)
    headers = {"Authorization": f"Bearer {wire.api_key}"} if wire.api_key else {}
    timeout = aiohttp.ClientTimeout(total=wire.timeout_s)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=timeout, read_bufsize=READ_BYTES
    ) as session:
        yield session


def _fail(shot: Shot, kind: str, message: str) -> None:
    """The first failure is the one that counts; what follows is its echo."""
    if shot.failure is None:
        shot.failure = kind
        shot.message = message[:MESSAGE_CHARACTERS]


def _message(text: str) -> str:
    """The words of an error body, whatever its shape."""
    try:
        body = json.loads(text)
    except ValueError:
        return text
    return error_text(body) if isinstance(body, dict) else text
