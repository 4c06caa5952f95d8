"""Streams that run as long as they are watched, and when each of their tokens came.

They are asked for on a route with a frame for every token, whatever its text. One that reaches its last
token begins anew; the time between is nobody's gap.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

import aiohttp

from benchmarks.dialects import LoraxDialect
from benchmarks.records import Wish
from benchmarks.sse import SseParser

FIRST_TOKENS = 8  # of each stream: then all of them decode


@dataclass(slots=True)
class Steady:
    """One stream."""

    wish: Wish
    times: list[list[float]] = field(default_factory=list)  # `perf_counter` of each token, by answer
    failures: list[str] = field(default_factory=list)
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)


def gaps_within(streams: Sequence[Steady], begin: float, end: float) -> list[float]:
    """Between neighbouring tokens of one answer that both came in [begin, end]."""
    return [
        later - earlier
        for stream in streams
        for times in stream.times
        for earlier, later in pairwise(times)
        if begin <= earlier and later <= end
    ]


@asynccontextmanager
async def steady_streams(
    session: aiohttp.ClientSession, url: str, wishes: Sequence[Wish]
) -> AsyncIterator[list[Steady]]:
    """All of them decode when the context opens; they are cut when it closes."""
    streams = [Steady(wish) for wish in wishes]
    tasks = [asyncio.create_task(_run(session, url, stream)) for stream in streams]
    try:
        await asyncio.gather(*(stream.has_begun.wait() for stream in streams))
        yield streams
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(session: aiohttp.ClientSession, url: str, stream: Steady) -> None:
    dialect = LoraxDialect({"ignore_eos_token": True})
    body = dialect.body(stream.wish, "")
    try:
        while not stream.failures:
            async with session.post(url + dialect.path, json=body) as response:
                if response.status != 200:
                    stream.failures.append(f"http {response.status}: {(await response.text())[:200]}")
                    break
                await _read(response, dialect, stream)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        stream.failures.append(f"{type(error).__name__}: {error}")
    finally:
        stream.has_begun.set()  # nobody waits for one that failed


async def _read(response: aiohttp.ClientResponse, dialect: LoraxDialect, stream: Steady) -> None:
    parser, finish = SseParser(), None
    times: list[float] = []
    stream.times.append(times)
    async for chunk in response.content.iter_any():
        now = perf_counter()
        for data in parser.feed(chunk):
            frame = dialect.read(json.loads(data))
            if frame.error is not None:
                stream.failures.append(frame.error)
            if frame.has_output:
                times.append(now)
            finish = frame.finish or finish
        if sum(map(len, stream.times)) >= FIRST_TOKENS:
            stream.has_begun.set()
    if finish is None and not stream.failures:
        stream.failures.append("cut off")
