"""From a folder to a host copy: outlined, read, checked, converted; once, and not again while it fails.

Everything that touches files happens in the loaders' pool. The outline, which is what config and header tell,
comes first: it is cheap, refuses most of what is broken, and says how many bytes the copy will take. Files
that were changed while they were read are not believed: neither half of them may be right.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from adapters.errors import AdapterError, AdapterInvalid, AdapterUnavailable
from adapters.failures import Failures
from adapters.flights import Flights
from adapters.origins import Place
from adapters.signature import Signature, sign
from adapters.store import AdapterStore, W
from adapters.types import Clock, Outline

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 2  # said about files that are being written
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AdapterFiles(Generic[W]):
    """How folders are read. All run in a pool; all but `sign` raise AdapterError."""

    outline: Callable[[Path], Outline]
    load: Callable[[Path], W]
    read_extras: Callable[[Path], object | None] = lambda folder: None  # what a lease has beside the weights
    sign: Callable[[Path], Signature] = sign  # raises OSError


@dataclass(frozen=True, slots=True)
class Arrived(Generic[W]):
    """What was read. The copy has a pin that belongs to whoever has this."""

    weights: W
    extras: object | None
    seconds: float  # reading, checking, converting
    store: AdapterStore[W]

    def again(self) -> Self:
        self.store.pin(self.weights.revision)
        return self

    def release(self) -> None:
        self.store.unpin(self.weights.revision)


def _ignore(error: AdapterError) -> None:
    """Nobody counts."""


class AdapterReader(Generic[W]):
    """Belongs to the event loop."""

    def __init__(
        self,
        files: AdapterFiles[W],
        store: AdapterStore[W],
        loaders: Executor,
        failures: Failures,
        clock: Clock = time.monotonic,
        on_failed: Callable[[AdapterError], None] = _ignore,
    ) -> None:
        """`on_failed` gets what went wrong with a load."""
        self._files = files
        self._store = store
        self._loaders = loaders
        self._failures = failures
        self._clock = clock
        self._on_failed = on_failed
        self._flights: Flights[Arrived[W]] = Flights()

    async def outline(self, folder: Path) -> Outline:
        """Raises AdapterError."""
        return await self._in_loaders(lambda: self._files.outline(folder))

    async def read(
        self, key: Hashable, place: Place, *, num_bytes: int | None = None, anew: bool = False
    ) -> Arrived[W]:
        """The copy and what else the folder holds; who asks for the same files at once shares the reading.

        `num_bytes`: of the copy, if that is known. `key`: whose failures are remembered. `anew`: for an
        operator, who does not wait until a failure expires. Raises AdapterError; what is only not possible
        now (AdapterUnavailable) is not remembered.
        """
        if not anew:
            self._failures.repeat(key, place.signature)
        work = partial(self._read, key, place, num_bytes)
        return await self._flights.join((place.folder, place.signature), work)

    async def close(self) -> None:
        """Give up what is being read."""
        await self._flights.close()

    async def _read(self, key: Hashable, place: Place, num_bytes: int | None) -> Arrived[W]:
        try:
            if num_bytes is None:
                num_bytes = (await self.outline(place.folder)).num_bytes
            reading = _Reading(self._files, place, self._clock)
            weights = await self._store.load(num_bytes, reading.run)
        except AdapterUnavailable as error:
            self._on_failed(error)
            raise
        except AdapterError as error:
            if await self._in_loaders(partial(_has_changed, self._files, place)):
                changed = _being_changed()
                self._on_failed(changed)
                raise changed from error
            self._on_failed(error)
            self._failures.remember(key, place.signature, error)
            raise
        self._failures.forget(key)
        return Arrived(weights, reading.extras, reading.seconds, self._store)

    async def _in_loaders(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._loaders, work)
        except AdapterError:
            raise
        except Exception as error:
            logger.exception("looking at an adapter failed in an unforeseen way")
            raise AdapterInvalid("the adapter cannot be read") from error


class _Reading(Generic[W]):
    """One run in the pool, and what comes out of it beside the weights."""

    def __init__(self, files: AdapterFiles[W], place: Place, clock: Clock) -> None:
        self._files = files
        self._place = place
        self._clock = clock
        self.extras: object | None = None
        self.seconds = 0.0

    def run(self) -> W:
        begun = self._clock()
        folder = self._place.folder
        weights = self._files.load(folder)
        self.extras = self._files.read_extras(folder)
        if _has_changed(self._files, self._place):
            raise _being_changed()
        self.seconds = self._clock() - begun
        return weights


def _has_changed(files: AdapterFiles[Any], place: Place) -> bool:
    """In the pool: whether somebody has written since the place was looked at."""
    return files.sign(place.folder) != place.signature


def _being_changed() -> AdapterUnavailable:
    return AdapterUnavailable("the adapter's files are being changed", retry_after_s=_RETRY_AFTER_S)
