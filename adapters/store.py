"""Host copies of adapters: each revision once, counted in bytes, kept as long as the bytes allow.

    load(bytes, read) ──> queue ──> bytes held, read in the pool ──> admitted, pinned ──> idle ──> evicted
                                                                       │    ^    │          oldest idle first
                                     get(revision), from any thread <──┘   pin, unpin

A copy is pinned by those who use it and idle when nobody does. Only idle copies are evicted, the one that
has been idle longest first, and only when others need their bytes. What is being read counts from the begin
of the reading on, by the size that the adapter's header tells; so the budget holds at every moment, and a
load waits while others read what it needs the room of. Who loads gets a pin in the same step of the event
loop in which the copy is admitted, so nothing can evict it before the one who waited wakes up.

No torch here: what is loaded is only known by `Weights`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from adapters.errors import AdapterError, AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from adapters.types import Described, Revision

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 2  # said when all room is in use; a request of usual length ends in that time
_MAX_READING = 2


class Weights(Described, Protocol):
    """What the store and the registry have to know of an adapter's tensors."""

    @property
    def revision(self) -> Revision: ...
    @property
    def invocation_tokens(self) -> tuple[int, ...]: ...


W = TypeVar("W", bound=Weights)


class NoRoom(AdapterUnavailable):
    """The copies in use leave no room."""

    def __init__(self) -> None:
        super().__init__("all memory for adapters is in use; try again later", retry_after_s=_RETRY_AFTER_S)


@dataclass(slots=True)
class _Copy(Generic[W]):
    """One revision in host memory."""

    weights: W
    num_pins: int = 0
    is_wanted: bool = True  # False: goes with its last pin


@dataclass(frozen=True, slots=True, eq=False)
class _Reading(Generic[W]):
    """One load, until it is admitted."""

    num_bytes: int
    read: Callable[[], W]
    done: "asyncio.Future[W]"


class AdapterStore(Generic[W]):
    """Belongs to the event loop, but for `get`, which any thread may call. May be made on another thread."""

    def __init__(self, pool: Executor, capacity_bytes: int, *, max_reading: int = _MAX_READING) -> None:
        """`max_reading`: loads that are under way in `pool` at once."""
        self.capacity_bytes = capacity_bytes
        self.num_evicted = 0  # copies that went because others needed the room
        self.on_evicted: Callable[[Revision], None] = _ignore
        """Called when a copy has gone, within whatever made it go; must not use the store."""
        self.on_discarded: Callable[[Revision], None] = _ignore
        """Called after that when the copy went because nobody will ask for its revision again."""
        self._pool = pool
        self._max_reading = max_reading
        self._copies: dict[Revision, _Copy[W]] = {}  # its entries are never moved: `get` needs no lock
        self._idle: dict[Revision, None] = {}  # unpinned, longest idle first
        self._queue: deque[_Reading[W]] = deque()
        self._num_reading = 0
        self._num_bytes = 0
        self._pinned_bytes = 0
        self._reading_bytes = 0

    # --- Copies -------------------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """Of all copies."""
        return self._num_bytes

    @property
    def free_bytes(self) -> int:
        """What could be loaded without an eviction."""
        return self.capacity_bytes - self._num_bytes - self._reading_bytes

    def is_loaded(self, revision: Revision) -> bool:
        return revision in self._copies

    def get(self, revision: Revision) -> W:
        """The copy of a pinned revision; from any thread. A KeyError is our bug: the caller holds no pin."""
        return self._copies[revision].weights

    def pin(self, revision: Revision) -> None:
        """One more user: the copy, which must be loaded, stays until as many have called `unpin`."""
        copy = self._copies[revision]
        if copy.num_pins == 0:
            del self._idle[revision]
            self._pinned_bytes += copy.weights.num_bytes
        copy.num_pins += 1

    def unpin(self, revision: Revision) -> None:
        """One user less; without users a copy is idle, or gone if it was discarded."""
        copy = self._copies[revision]
        assert copy.num_pins > 0, "unpinned more often than pinned"
        copy.num_pins -= 1
        if copy.num_pins:
            return
        self._idle[revision] = None
        self._pinned_bytes -= copy.weights.num_bytes
        if not copy.is_wanted:
            self._drop(revision)

    def discard(self, revision: Revision) -> None:
        """Nobody will ask for this revision again: it goes now, or with its last pin."""
        copy = self._copies.get(revision)
        if copy is None:
            return
        copy.is_wanted = False
        if not copy.num_pins:
            self._drop(revision)

    def total_pins(self) -> int:
        """Of all copies. For tests."""
        return sum(copy.num_pins for copy in self._copies.values())

    def check(self) -> None:
        """Recompute what is counted; raises AssertionError. For tests."""
        sizes = {revision: copy.weights.num_bytes for revision, copy in self._copies.items()}
        pinned = {revision for revision, copy in self._copies.items() if copy.num_pins}
        assert self._num_bytes == sum(sizes.values())
        assert self._num_bytes + self._reading_bytes <= self.capacity_bytes
        assert self._pinned_bytes == sum(sizes[revision] for revision in pinned)
        assert self._idle.keys() == sizes.keys() - pinned
        assert all(copy.is_wanted or copy.num_pins for copy in self._copies.values())
        assert 0 <= self._num_reading <= self._max_reading
        assert self._num_reading or not (self._reading_bytes or self._queue), "nothing moves on any more"

    # --- Loading ------------------------------------------------------------------------------------------

    async def load(self, num_bytes: int, read: Callable[[], W]) -> W:
        """Run `read` in the pool and admit what it gives, with one pin that the caller has to give back.

        If a copy of that revision is there already, it stays the only one. `num_bytes`: what the copy will
        take. What was begun is read to its end if the caller leaves, and then dropped.

        Raises what `read` raises; AdapterTooLarge; NoRoom if the copies in use leave none; AdapterInvalid
        for what nobody foresaw.
        """
        if num_bytes > self.capacity_bytes:
            raise self._too_large(num_bytes)
        done: asyncio.Future[W] = asyncio.get_running_loop().create_future()
        reading = _Reading(num_bytes, read, done)
        self._queue.append(reading)
        self._begin_readings()
        try:
            return await done
        except asyncio.CancelledError:
            if done.done() and not done.cancelled() and done.exception() is None:
                self.unpin(done.result().revision)  # landed and cancelled in one step of the loop
            self._begin_readings()  # whoever waited behind this one
            raise

    def _begin_readings(self) -> None:
        """In the order in which they came, each when there is a free reader and room."""
        while self._queue and self._num_reading < self._max_reading:
            reading = self._queue[0]
            if not reading.done.done():
                in_use = self._pinned_bytes + reading.num_bytes
                if in_use > self.capacity_bytes:
                    reading.done.set_exception(NoRoom())
                elif in_use + self._reading_bytes > self.capacity_bytes:
                    return  # until what is being read has landed
                else:
                    self._begin(reading)
            self._queue.popleft()

    def _begin(self, reading: _Reading[W]) -> None:
        try:
            outcome = asyncio.get_running_loop().run_in_executor(self._pool, reading.read)
        except RuntimeError:  # the pool is closed
            reading.done.set_exception(_shutting_down())
            return
        self._evict_for(reading.num_bytes)
        self._num_reading += 1
        self._reading_bytes += reading.num_bytes
        outcome.add_done_callback(partial(self._land, reading))

    def _land(self, reading: _Reading[W], outcome: "asyncio.Future[W]") -> None:
        """It was read, or not: tell the one who waits."""
        self._num_reading -= 1
        self._reading_bytes -= reading.num_bytes
        try:
            weights = _result(outcome)
            if not reading.done.done():
                weights = self._admit(weights)
                self.pin(weights.revision)
                reading.done.set_result(weights)
        except AdapterError as error:
            if not reading.done.done():
                reading.done.set_exception(error)
        self._begin_readings()

    def _admit(self, weights: W) -> W:
        """The copy of what was read. Raises AdapterTooLarge or NoRoom, if it is more than was foreseen."""
        known = self._copies.get(weights.revision)
        if known is not None:
            known.is_wanted = True
            return known.weights
        num_bytes = weights.num_bytes
        if num_bytes > self.capacity_bytes:
            raise self._too_large(num_bytes)
        if self._pinned_bytes + self._reading_bytes + num_bytes > self.capacity_bytes:
            raise NoRoom
        self._evict_for(num_bytes)
        self._copies[weights.revision] = _Copy(weights)
        self._idle[weights.revision] = None
        self._num_bytes += num_bytes
        return weights

    def _too_large(self, num_bytes: int) -> AdapterTooLarge:
        return AdapterTooLarge(
            f"the adapter needs {num_bytes} bytes of host memory; adapters may take {self.capacity_bytes}"
        )

    def _evict_for(self, num_bytes: int) -> None:
        """Evict idle copies until `num_bytes` are free; enough are idle."""
        while num_bytes > self.free_bytes:
            self._evict(next(iter(self._idle)))
            self.num_evicted += 1

    def _drop(self, revision: Revision) -> None:
        self._evict(revision)
        self.on_discarded(revision)

    def _evict(self, revision: Revision) -> None:
        del self._idle[revision]
        self._num_bytes -= self._copies.pop(revision).weights.num_bytes
        self.on_evicted(revision)


def _result(outcome: "asyncio.Future[W]") -> W:
    """What the pool has to say; all that can go wrong is an AdapterError, whatever is in the files."""
    try:
        return outcome.result()
    except AdapterError:
        raise
    except asyncio.CancelledError as error:  # the pool is being closed
        raise _shutting_down() from error
    except Exception as error:
        logger.exception("reading an adapter failed in an unforeseen way")
        raise AdapterInvalid("the adapter cannot be read") from error


def _shutting_down() -> AdapterUnavailable:
    return AdapterUnavailable("the server is shutting down", retry_after_s=_RETRY_AFTER_S)


def _ignore(revision: Revision) -> None:
    """Nobody keeps books."""
