"""Host copies of adapters: each revision once, read in the pool, kept as long as bytes allow.

    load(folder) ──> flight ──> pool reads ──> admitted, a pin for each waiter ──> unpin ──> idle ──> evicted
                       ^ later waiters join                                          │  oldest idle first
                                              get(revision), from any thread <───────┘

A copy is pinned by those who use it and idle when nobody does. Only idle copies are evicted, the one that
has been idle longest first, and only when another copy needs their bytes. A waiter gets its pin in the same
step of the event loop in which the copy is admitted, so nothing can evict the copy before the waiter wakes
up. Files that could not be loaded are left alone for some seconds: clients that try again at once are
answered from memory.

The bytes of files that are being read are not counted yet; the pool's threads bound how many there are. No
torch here: what is loaded is only known by `Weights`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from adapters.errors import AdapterError, AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from adapters.types import Clock, Revision

logger = logging.getLogger(__name__)

_FAILURE_S = 5.0  # how long files that failed are not read again
_RETRY_AFTER_S = 2  # said when all room is in use; a request of usual length ends in that time


class Weights(Protocol):
    """What the store and the registry have to know of an adapter's tensors."""

    @property
    def revision(self) -> Revision: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def target_names(self) -> tuple[str, ...]: ...


W = TypeVar("W", bound=Weights)


@dataclass(slots=True)
class _Copy(Generic[W]):
    """One revision in host memory."""

    weights: W
    num_pins: int = 0
    is_wanted: bool = True  # False: goes with its last pin


@dataclass(slots=True)
class _Flight(Generic[W]):
    """One folder being read, and those who wait for it."""

    waiters: list["asyncio.Future[W]"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Failure:
    """What was wrong with a folder, and until when to believe it."""

    error: AdapterError
    until: float  # the clock's seconds


class AdapterStore(Generic[W]):
    """Belongs to the event loop, but for `get`, which any thread may call. May be made on another thread."""

    def __init__(
        self,
        load: Callable[[Path], W],
        pool: Executor,
        capacity_bytes: int,
        clock: Clock = time.monotonic,
        *,
        on_loaded: Callable[[float], None] | None = None,
    ) -> None:
        """`load` runs in `pool` and raises AdapterError. `on_loaded` gets the seconds that it took."""
        self.capacity_bytes = capacity_bytes
        self._load = load
        self._pool = pool
        self._clock = clock
        self._on_loaded = on_loaded
        self._copies: dict[Revision, _Copy[W]] = {}  # its entries are never moved: `get` needs no lock
        self._idle: dict[Revision, None] = {}  # unpinned, longest idle first
        self._flights: dict[Path | str, _Flight[W]] = {}  # the newest of each folder or key
        self._failures: dict[Path | str, _Failure] = {}
        self._num_bytes = 0
        self._pinned_bytes = 0

    # --- Copies -------------------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """Of all copies."""
        return self._num_bytes

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
            self._evict(revision)

    def discard(self, revision: Revision) -> None:
        """Nobody will ask for this revision again: it goes now, or with its last pin."""
        copy = self._copies.get(revision)
        if copy is None:
            return
        copy.is_wanted = False
        if not copy.num_pins:
            self._evict(revision)

    def check(self) -> None:
        """Recompute what is counted; raises AssertionError. For tests."""
        sizes = {revision: copy.weights.num_bytes for revision, copy in self._copies.items()}
        pinned = {revision for revision, copy in self._copies.items() if copy.num_pins}
        assert self._num_bytes == sum(sizes.values()) <= self.capacity_bytes
        assert self._pinned_bytes == sum(sizes[revision] for revision in pinned)
        assert self._idle.keys() == sizes.keys() - pinned
        assert all(copy.is_wanted or copy.num_pins for copy in self._copies.values())

    # --- Loading ------------------------------------------------------------------------------------------

    async def load(self, folder: Path, *, anew: bool = False) -> W:
        """Read the adapter in `folder` and admit it, with one pin that the caller has to give back.

        The files are read even if a copy of them is there: they may have changed. A load of the same folder
        that is under way is joined; it goes on if those who wait for it leave. `anew`: for an operator who
        may have changed the files a moment ago; neither joins an older load nor repeats a remembered
        failure.

        Raises AdapterInvalid, AdapterIncompatible, AdapterTooLarge; AdapterUnavailable if the copies in use
        leave no room.
        """
        return await self._wait_for(folder, lambda: self._load(folder), anew)

    async def make(self, key: str, build: Callable[[], W]) -> W:
        """The same for what `build` makes in the pool, of revision `key`; not again while that is here."""
        if Revision(key) in self._copies:
            self.pin(Revision(key))
            return self.get(Revision(key))
        return await self._wait_for(key, build, anew=False)

    async def _wait_for(self, what: Path | str, make: Callable[[], W], anew: bool) -> W:
        flight = None if anew else self._flights.get(what)
        if flight is None:
            if not anew:
                self._repeat_failure(what)
            flight = self._take_off(what, make)
        waiter: asyncio.Future[W] = asyncio.get_running_loop().create_future()
        flight.waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.unpin(waiter.result().revision)  # landed and cancelled in one step of the loop
            raise

    def _take_off(self, folder: Path | str, make: Callable[[], W]) -> _Flight[W]:
        """Begin to read; who comes later joins this flight, the newest."""
        reading = asyncio.get_running_loop().run_in_executor(self._pool, self._read, make)
        flight: _Flight[W] = _Flight()
        self._flights[folder] = flight
        reading.add_done_callback(partial(self._land, folder, flight))
        return flight

    def _read(self, make: Callable[[], W]) -> tuple[W, float]:
        """In the pool. The weights, and the seconds it took."""
        begun = self._clock()
        weights = make()
        return weights, self._clock() - begun

    def _land(
        self, folder: Path | str, flight: _Flight[W], reading: "asyncio.Future[tuple[W, float]]"
    ) -> None:
        """The files were read, or not: tell all who wait, and remember a failure."""
        is_newest = self._flights.get(folder) is flight
        if is_newest:
            del self._flights[folder]
        try:
            read, seconds = _outcome(reading)
            weights = self._admit(read)
        except AdapterError as error:
            _forget_origin(error)
            if is_newest:
                self._remember(folder, error)
            for waiter in flight.waiters:
                if not waiter.done():
                    waiter.set_exception(error)
            return
        self._failures.pop(folder, None)
        for waiter in flight.waiters:
            if not waiter.done():
                self.pin(weights.revision)
                waiter.set_result(weights)
        if self._on_loaded is not None:
            self._on_loaded(seconds)

    def _admit(self, weights: W) -> W:
        """The copy of what was read. Raises AdapterTooLarge or AdapterUnavailable."""
        known = self._copies.get(weights.revision)
        if known is not None:
            known.is_wanted = True
            return known.weights
        self._make_room(weights.num_bytes)
        self._copies[weights.revision] = _Copy(weights)
        self._idle[weights.revision] = None
        self._num_bytes += weights.num_bytes
        return weights

    def _make_room(self, num_bytes: int) -> None:
        """Evict idle copies until `num_bytes` are free; none if that would not be enough."""
        if num_bytes > self.capacity_bytes:
            raise AdapterTooLarge(
                f"the adapter needs {num_bytes} bytes of host memory; adapters may take {self.capacity_bytes}"
            )
        if not self._has_room(num_bytes):
            raise _NoRoom(num_bytes)
        while self._num_bytes + num_bytes > self.capacity_bytes:
            self._evict(next(iter(self._idle)))

    def _has_room(self, num_bytes: int) -> bool:
        """Whether what is in use leaves `num_bytes`."""
        return self._pinned_bytes + num_bytes <= self.capacity_bytes

    def _evict(self, revision: Revision) -> None:
        del self._idle[revision]
        self._num_bytes -= self._copies.pop(revision).weights.num_bytes

    # --- Failures -----------------------------------------------------------------------------------------

    def _repeat_failure(self, folder: Path | str) -> None:
        """Raise what was wrong with this folder a moment ago, unless that may be different now."""
        failure = self._failures.get(folder)
        if failure is None:
            return
        error = failure.error
        has_room_now = isinstance(error, _NoRoom) and self._has_room(error.num_bytes)
        if has_room_now or self._clock() >= failure.until:
            del self._failures[folder]
            return
        raise error.with_traceback(None)  # else it would grow with every raise

    def _remember(self, folder: Path | str, error: AdapterError) -> None:
        now = self._clock()
        for expired in [known for known, failure in self._failures.items() if now >= failure.until]:
            del self._failures[expired]
        self._failures[folder] = _Failure(error, now + _FAILURE_S)


class _NoRoom(AdapterUnavailable):
    """The copies in use leave no room for so many bytes."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__("all memory for adapters is in use; try again later", retry_after_s=_RETRY_AFTER_S)
        self.num_bytes = num_bytes


def _outcome(reading: "asyncio.Future[tuple[W, float]]") -> tuple[W, float]:
    """What the pool has to say; all that can go wrong is an AdapterError, whatever is in the files."""
    try:
        return reading.result()
    except AdapterError:
        raise
    except asyncio.CancelledError as error:  # the pool is being closed
        raise AdapterUnavailable("the server is shutting down", retry_after_s=_RETRY_AFTER_S) from error
    except Exception as error:
        logger.exception("reading an adapter failed in an unforeseen way")
        raise AdapterInvalid("the adapter cannot be read") from error


def _forget_origin(error: AdapterError) -> None:
    """An error that is remembered must not keep the frames alive that raised it: they hold what was read."""
    error.__cause__ = error.__context__ = error.__traceback__ = None
