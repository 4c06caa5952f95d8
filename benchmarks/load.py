"""The two ways to put load on a server.

Closed loop: a fixed number of users, each sending its next request when the last one is answered. It measures
what the server can do, and slows down with it. Open loop: requests leave by a schedule, whatever the server
does. It measures what users feel at a given rate. While either runs, a sampler measures how late this
process's own event loop is: when that is not small against the latencies measured, the client is the
bottleneck and the numbers are not the server's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter

from benchmarks.lag import lag_sampler
from benchmarks.records import Level, Shot, Wish

Send = Callable[[Wish], Awaitable[Shot]]
OnDone = Callable[[Shot], None]


@dataclass(frozen=True, slots=True)
class Limit:
    """When to stop sending; what is under way is always waited for. Exactly one is set."""

    requests: int | None = None
    seconds: float | None = None

    def allows(self, number: int, elapsed: float) -> bool:
        if self.requests is not None:
            return number < self.requests
        return self.seconds is not None and elapsed < self.seconds


async def closed_loop(
    send: Send, wishes: Iterator[Wish], users: int, limit: Limit, on_done: OnDone, ramp_s: float = 0.0
) -> Level:
    """The users come one after the other over `ramp_s` seconds: together they would stay in step for long."""
    shots: list[Shot] = []
    began = perf_counter()
    number = 0

    async def user(place: int) -> None:
        nonlocal number
        await asyncio.sleep(ramp_s * place / users)
        while limit.allows(number, perf_counter() - began):
            number += 1
            shot = await send(next(wishes))
            shots.append(shot)
            on_done(shot)

    async with lag_sampler() as lags, asyncio.TaskGroup() as group:
        for place in range(users):
            group.create_task(user(place))
    return _level("concurrency", users, shots, lags)


async def open_loop(
    send: Send, wishes: Iterator[Wish], rate: float, schedule: Iterator[float], limit: Limit, on_done: OnDone
) -> Level:
    """`schedule` holds offsets from now.

    A request that leaves late is still counted from when it should have left.
    """
    shots: list[Shot] = []

    async def one(wish: Wish) -> None:
        shot = await send(wish)
        shots.append(shot)
        on_done(shot)

    async with lag_sampler() as lags, asyncio.TaskGroup() as group:
        began = perf_counter()
        for number, offset in enumerate(schedule):
            if not limit.allows(number, offset):
                break
            wish = next(wishes)  # made before the wait, not after it
            delay = began + offset - perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            group.create_task(one(replace(wish, scheduled=began + offset)))
    return _level("rate", rate, shots, lags)


def _level(kind: str, value: float, shots: list[Shot], lags: list[float]) -> Level:
    wall = max(s.done for s in shots) - min(s.scheduled for s in shots) if shots else 0.0
    return Level(kind, value, tuple(shots), wall, tuple(lags))
