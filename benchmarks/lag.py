"""How late an event loop is: what anybody who wants a turn on it has to wait.

A short sleep is asked for over and over; how much later than asked it returns is the time that other
callbacks took.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

LAG_PERIOD_S = 0.01


@asynccontextmanager
async def lag_sampler() -> AsyncIterator[list[float]]:
    """How much later than asked a short sleep returns: the list grows while the context is open."""
    lags: list[float] = []

    async def sample() -> None:
        while True:
            asked = perf_counter() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            lags.append(max(0.0, perf_counter() - asked))

    task = asyncio.create_task(sample())
    try:
        yield lags
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
