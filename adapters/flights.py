"""Work that is done once, however many wait for it, and to its end even if they leave.

What comes out holds an adapter, and everybody who waits gets a hold of their own in the same step of the
event loop in which the work ends: so nothing can evict the adapter before they wake up.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

from adapters.errors import AdapterError, AdapterUnavailable

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 10  # said while shutting down: until another server is there


class Hold(Protocol):
    """Something that has to be given back."""

    def again(self) -> Self:
        """Another hold of the same."""
        ...

    def release(self) -> None: ...


H = TypeVar("H", bound=Hold)


@dataclass(slots=True, eq=False)
class _Flight(Generic[H]):
    """Work under way, and those who wait for it."""

    task: "asyncio.Task[H]"
    waiters: list["asyncio.Future[H]"] = field(default_factory=list)


class Flights(Generic[H]):
    """Belongs to the event loop."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[H]] = {}

    async def join(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, H]]) -> H:
        """The outcome of the work of that key that is under way, or of this one. Raises what it raises."""
        waiter: asyncio.Future[H] = asyncio.get_running_loop().create_future()
        self._get_or_begin(key, work).waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().release()  # landed and cancelled in one step of the loop
            raise

    async def run(self, work: Callable[[], Coroutine[Any, Any, H]]) -> H:
        """The outcome of this work, which nobody else joins."""
        return await self.join(object(), work)

    def begin(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, H]]) -> None:
        """For whoever comes later."""
        self._get_or_begin(key, work)

    def num_waiting(self, key: Hashable) -> int:
        """For tests."""
        return len(self._flights[key].waiters) if key in self._flights else 0

    async def close(self) -> None:
        """End everything; who waits is told to come back later."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _get_or_begin(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, H]]) -> _Flight[H]:
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(asyncio.create_task(work()))
            flight.task.add_done_callback(partial(self._land, key))
            self._flights[key] = flight
        return flight

    def _land(self, key: Hashable, task: "asyncio.Task[H]") -> None:
        waiters = [waiter for waiter in self._flights.pop(key).waiters if not waiter.done()]
        error: BaseException | None
        if task.cancelled():
            error = AdapterUnavailable("the server is shutting down", retry_after_s=_RETRY_AFTER_S)
        else:
            error = task.exception()
        if error is None:
            for waiter in waiters:
                waiter.set_result(task.result().again())
            task.result().release()
            return
        if not waiters and not isinstance(error, AdapterError):
            logger.error("loading an adapter failed in an unforeseen way", exc_info=error)
        for waiter in waiters:
            waiter.set_exception(error)
