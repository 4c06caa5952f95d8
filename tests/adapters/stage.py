"""A registry over made-up files, for the tests that look at it from several sides."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterError, AdapterInvalid, AdapterNotFound
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from adapters.types import AdapterRef, Revision
from tests.adapters.fake_files import LIMIT_S, FakeClock, FakeFiles, FakeWeights, Gate

ROOT = "/adapters"


class FakeSource:
    """Sub-folders of ROOT by name; any path below it."""

    def __init__(self) -> None:
        self.sub_folders: set[str] = set()
        self.asked: list[str] = []
        self.lost: set[str] = set()
        self.relative: set[str] = set()  # paths that are written like names
        self._gate: Gate | None = None

    @contextmanager
    def held(self) -> Iterator[Gate]:
        """Whoever looks for a name inside the block waits for its end."""
        gate = self._gate = Gate()
        try:
            yield gate
        finally:
            self._gate = None
            gate.is_open.set()

    def find(self, name: str) -> Path | None:
        self.asked.append(name)
        if self._gate is not None:
            self._gate.pass_through()
        return Path(ROOT, name) if name in self.sub_folders else None

    def check_path(self, path: str) -> Path:
        if not path.startswith(ROOT + "/") and path not in self.relative:
            raise AdapterInvalid(f"{path} is outside the allowed folders")
        if path in self.lost:
            raise AdapterNotFound(f"{path} is not a folder")
        return Path(path)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.sub_folders))


class FakeRemote:
    """Locations that begin with its name and "://". What each token may see, and what it means now."""

    def __init__(self, name: str, files: FakeFiles) -> None:
        self.name = name
        self.resolved: list[tuple[str, str | None]] = []
        self.fetched: list[tuple[str, str, str | None]] = []
        self.error: AdapterError | None = None  # of whoever asks
        self.refused_files: set[str | None] = set()  # tokens that may ask, but not fetch
        self.gate: Gate | None = None  # of fetches
        self._files = files
        self._versions: dict[str, str] = {}
        self._readers: dict[str, set[str | None]] = {}
        self._lock = threading.Lock()

    def put(
        self,
        location: str,
        version: str,
        revision: str,
        num_bytes: int = 10,
        *,
        readers: tuple[str | None, ...] = (None,),
    ) -> Path:
        """What is there from now on, and the tokens that may see it."""
        self._versions[location] = version
        self._readers[location] = set(readers)
        return self._files.put(self._folder(location, version), revision, num_bytes)

    def revoke(self, location: str, token: str | None) -> None:
        self._readers[location].discard(token)

    def accepts(self, location: str) -> bool:
        return location.startswith(f"{self.name}://") or (self.name == "hub" and location.count("/") == 1)

    def resolve(self, location: str, token: str | None) -> str:
        with self._lock:
            self.resolved.append((location, token))
        if self.error is not None:
            raise self.error
        if token not in self._readers.get(location, set()):
            raise AdapterNotFound(f"{self.name} has no {location} for this token")
        return self._versions[location]

    def fetch(self, location: str, version: str, token: str | None) -> Path:
        with self._lock:
            self.fetched.append((location, version, token))
        if self.gate is not None:
            self.gate.pass_through()
        if token in self.refused_files:
            raise AdapterNotFound("the files are not for this token")
        return Path(self._folder(location, version))

    def close(self) -> None:
        """There is no network."""

    def _folder(self, location: str, version: str) -> str:
        return f"/cache/{location}/{version}"


class Stage:
    """A registry whose files are made up; its store has 100 bytes."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.files = FakeFiles()
        self.source = FakeSource()
        self.hub = FakeRemote("hub", self.files)
        self.s3 = FakeRemote("s3", self.files)
        self.clock = FakeClock()
        self.unix_time = 1_763_000_000.9
        self.store: AdapterStore[FakeWeights] = AdapterStore(pool, 100)
        self.pins: list[frozenset[AdapterRef]] = []
        self.loads: list[tuple[str, float]] = []  # names, or locations, and seconds
        self.failures: list[AdapterError] = []
        self.registry = AdapterRegistry(
            self.store,
            self.source,
            self.files.files,
            pool,
            pool,
            remotes={"hub": self.hub, "s3": self.s3},
            reserved=frozenset({"base"}),
            on_pins=self.pins.append,
            on_loaded=lambda name, seconds: self.loads.append((name, seconds)),
            on_failed=self.failures.append,
            now=lambda: self.unix_time,
            clock=self.clock,
        )

    def put(self, name: str, revision: str, num_bytes: int = 10, *, extras: object | None = None) -> str:
        """A sub-folder of the adapters folder; its path."""
        self.source.sub_folders.add(name)
        return str(self.files.put(f"{ROOT}/{name}", revision, num_bytes, extras=extras))

    async def use(self, name: str, **how: Any) -> None:
        (await self.registry.acquire(name, **how)).release()

    async def crowd_out(self) -> None:
        """Make the store evict all that is idle."""
        num_bytes = 100 - self.store._pinned_bytes
        crowd = await self.store.load(num_bytes, lambda: FakeWeights(Revision("crowd"), num_bytes))
        self.store.discard(crowd.revision)
        self.store.unpin(crowd.revision)

    def is_held(self, revision: str) -> bool:
        """Whether somebody has a lease of it."""
        copy = self.store._copies.get(Revision(revision))
        return copy is not None and copy.num_pins > 0

    def names(self) -> list[str]:
        return [info.ref.name for info in self.registry.list()]


async def reached(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.is_reached.wait, LIMIT_S)


async def one_step() -> None:
    """Let all that is ready run once."""
    await asyncio.sleep(0)


async def waiting(stage: Stage, key: object, num_waiters: int) -> None:
    """Return when so many wait for a flight of that key that is held."""
    async with asyncio.timeout(LIMIT_S):
        while stage.registry._flights.num_waiting(key) < num_waiters:
            await one_step()


def without_suspending(work: Any) -> Any:
    """Run a coroutine that must not wait for anything."""
    with pytest.raises(StopIteration) as done:
        work.send(None)
    return done.value.value
