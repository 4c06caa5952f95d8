"""Adapters: what there is, and the right to use one.

    acquire(name) ── known and loaded ────────────────────────────────────────────> lease      no suspension
                  └─ else ──> locate (pool) ──> read (loaders) ──> the name means it ──> lease

A name means one revision at a time; a lease keeps the revision that the name meant when it was taken, to
its end. So files may change under a name: while the new ones are read, requests go on with the old revision;
then the name switches in one step; if the new ones cannot be loaded, the old revision stays. The store may
evict what nobody uses: then the name stays, and the next `acquire` reads its files again, which may be
another revision by then. Two names of one revision share its weights.

All state changes on the event loop, in steps that do not suspend; only the file work is in the pools. Work
that was begun is finished in a task of its own: a client that leaves, or is told to come back later, finds
it done.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError, AdapterInvalid, AdapterNotFound
from adapters.failures import Failures
from adapters.flights import Flights
from adapters.leases import AdapterLease, Holders
from adapters.merges import MergedAdapters
from adapters.named import NamedAdapter, NamedAdapters, unknown_adapter
from adapters.names import shown
from adapters.origins import LOCAL, ChosenPath, Origin, OwnFolder, RemotePlace, Source, SubFolder
from adapters.reader import AdapterFiles, AdapterReader
from adapters.remotes import RemoteAdapters
from adapters.sources.remote import RemoteSource
from adapters.store import AdapterStore, W
from adapters.types import AdapterInfo, AdapterRef, AdapterStatus, Clock, Unloaded

logger = logging.getLogger(__name__)

MAX_NAME_CHARS = 256
_MAX_WARMED = 32  # adapters that are loaded before anybody asks for them


class AdapterRegistry:
    """Belongs to the event loop. May be made on another thread."""

    def __init__(
        self,
        store: AdapterStore[Any],
        source: Source,
        files: AdapterFiles[Any],
        pool: Executor,
        loaders: Executor,
        *,
        askers: Executor | None = None,
        fetchers: Executor | None = None,
        remotes: Mapping[str, RemoteSource] | None = None,
        reserved: frozenset[str] = frozenset(),
        on_pins: Callable[[frozenset[AdapterRef]], None] | None = None,
        on_loaded: Callable[[str, float], None] = lambda name, seconds: None,
        on_failed: Callable[[AdapterError], None] = lambda error: None,
        now: Clock = time.time,
        clock: Clock = time.monotonic,
    ) -> None:
        """`pool` looks for folders, `loaders` read them, `askers` ask remotes, `fetchers` fetch (default of
        both: `pool`).

        `remotes`: by the name that clients call them. `reserved`: names that mean the base model.
        `on_pins` gets all pinned revisions whenever they are others. `on_loaded` gets the name, or the
        location, and the seconds of a load, `on_failed` what went wrong with one. `now`: unix time.
        """
        self._store = store
        self._source = source
        self._sign = files.sign
        self._pool = pool
        self._reserved = reserved
        self._on_pins = on_pins
        self._pins: frozenset[AdapterRef] = frozenset()
        self._listed: tuple[AdapterInfo, ...] | None = ()  # None: has to be made again
        self._flights: Flights[AdapterLease] = Flights()
        self._holders = Holders(store, now)
        failures = Failures(clock)
        self._reader = reader = AdapterReader(files, store, loaders, failures, clock, on_failed)
        self._named = NamedAdapters(
            store,
            reader,
            self._holders,
            self._flights,
            failures,
            by_name=self._sub_folder,
            pool=pool,
            fetchers=fetchers or pool,
            now=now,
            on_change=self._changed,
            on_loaded=on_loaded,
        )
        self._remote = RemoteAdapters(
            remotes or {},
            reader,
            self._holders,
            self._flights,
            failures,
            sign=files.sign,
            askers=askers or pool,
            fetchers=fetchers or pool,
            now=now,
            on_loaded=on_loaded,
        )
        self._merged = MergedAdapters(store, self._holders, self._flights, now)

    # --- What there is ------------------------------------------------------------------------------------

    def list(self) -> tuple[AdapterInfo, ...]:
        """What can be asked for by name, sorted by it. Without what turned out to be broken."""
        if self._listed is None:
            known = self._named.known
            self._listed = tuple(known[name].info for name in sorted(known) if known[name].is_servable)
        return self._listed

    def get(self, name: str) -> AdapterInfo | None:
        """As `list` would show it."""
        known = self._named.known.get(name)
        return known.info if known is not None and known.is_servable else None

    def is_loaded(self, ref: AdapterRef) -> bool:
        """Whether the weights are in host memory."""
        return self._store.is_loaded(ref.revision)

    def status(self, name: str) -> AdapterStatus | None:
        """Of a registered name, broken ones included; None for all others."""
        known = self._named.known.get(name)
        return None if known is None else _status(known)

    def statuses(self) -> tuple[AdapterStatus, ...]:
        """Sorted by name."""
        known = self._named.known
        return tuple(_status(known[name]) for name in sorted(known))

    @property
    def num_evicted(self) -> int:
        """How many copies left host memory because others needed theirs."""
        return self._store.num_evicted

    # --- Use ----------------------------------------------------------------------------------------------

    async def acquire(
        self, name: str, *, source: str | None = None, token: str | None = None
    ) -> AdapterLease:
        """The adapter that a client means, held until released. Does not suspend if it is loaded.

        `source`: "local" for a registered name or a sub-folder of the adapters folder, or a remote, whose
        location `name` is then; None: a name if there is one, else a location of the remote that has such
        ones. `token`: the client's own, for a remote.

        Raises AdapterError.
        """
        if source is not None and source != LOCAL:
            return await self._remote.acquire(self._remote.get(source, name), name, token)
        if (lease := self._named.lease(name)) is not None:
            return lease
        try:
            if not is_adapter_name(name) or name in self._reserved:
                raise unknown_adapter(name)
            return await self._named.acquire(name)
        except AdapterNotFound:
            remote = None if source == LOCAL or name in self._reserved else self._remote.accepting(name)
            if remote is None or name in self._named.known:
                raise
        return await self._remote.acquire(remote, name, token)

    async def derive(
        self, key: str, leases: Sequence[AdapterLease], build: Callable[[Sequence[W]], W]
    ) -> AdapterLease:
        """An adapter made of others, held until released. Built once, in the loaders; never listed.

        `key` says all about it: the revisions, and what is done with them. The parts stay the caller's.
        Raises what `build` raises if that is an AdapterError, and AdapterTooLarge or AdapterUnavailable.
        """
        return await self._merged.derive(key, leases, build)

    # --- Administration -----------------------------------------------------------------------------------

    async def load(
        self,
        name: str,
        path: str,
        *,
        source: str | None = None,
        token: str | None = None,
        load_inplace: bool = False,
        is_pinned: bool = False,
    ) -> AdapterInfo:
        """Register an adapter under a name; `load_inplace` replaces what the name meant.

        `path` is a path on this machine, or a location of the remote `source`, which is asked with `token`
        for as long as the name stands for it. Without a source it is a path if it is written like one or
        leads to a folder, and else a location of the remote that has such ones.

        Requests that run keep the revision they have. The same content again changes nothing, except that a
        name follows it to another folder. A load that was begun is finished even if the caller is
        cancelled.

        Raises AdapterError: for a name that is not allowed, a path outside the roots, files that cannot be
        served, and other content than the name has.
        """
        self.check_name(name)
        origin = await self._origin_of(path, source, token)
        return await self._load(name, origin, load_inplace, is_pinned)

    async def register(
        self,
        name: str,
        folder: Path,
        *,
        source: str = LOCAL,
        load_inplace: bool = False,
        is_pinned: bool = False,
    ) -> AdapterInfo:
        """As `load`, for a folder that no client has chosen: it may be anywhere. `source`: what lists say."""
        self.check_name(name)
        origin = OwnFolder(folder, self._sign, source)
        return await self._load(name, origin, load_inplace, is_pinned)

    async def adopt(self, name: str, *, load_inplace: bool = False, is_pinned: bool = False) -> AdapterInfo:
        """As `load`, for the sub-folder of the adapters folder that is called like the name."""
        self.check_name(name)
        return await self._load(name, self._sub_folder(name), load_inplace, is_pinned)

    async def unload(self, name: str, *, force: bool = False) -> Unloaded | None:
        """Forget the name at once; None if it was not known. The weights go when their last lease ends.

        `force`: the caller is about to end the leases. A sub-folder of the adapters folder is found again by
        the next `acquire` of its name, as it is by vLLM with a resolver: unloading frees memory, or makes
        changed files count. Who wants to retire such an adapter removes its folder.
        """
        if name not in self._named.known:
            return None
        before = self._store.num_bytes
        known = self._named.forget(name)
        freed = before - self._store.num_bytes
        how = "by force" if force else "when they end"
        users = f"; {known.users} requests give it up {how}" if known.users else ""
        logger.info("adapter %s: unloaded, %d bytes freed%s", shown(name), freed, users)
        return Unloaded(name, known.info.revision, freed, known.users)

    def pin(self, name: str) -> AdapterInfo:
        """Its weights stay in memory, whatever revision the name will mean. Idempotent.

        Begins to load them, if they are not there. Raises AdapterNotFound.
        """
        return self._named.pin(name)

    def unpin(self, name: str) -> AdapterInfo:
        """Idempotent. Raises AdapterNotFound."""
        return self._named.unpin(name)

    def check_name(self, name: str) -> None:
        """Raises AdapterInvalid for a name that no adapter may have."""
        if not is_adapter_name(name):
            raise AdapterInvalid(f"{shown(name)} cannot be the name of an adapter")
        if name in self._reserved:
            raise AdapterInvalid(f"{shown(name)} is a name of the base model")

    async def close(self) -> None:
        """Give up what is still being loaded; what the pool has begun to read is read to its end."""
        await self._reader.close()
        await self._flights.close()

    # --- What lies in the adapters folder -----------------------------------------------------------------

    async def refresh(self, name: str, *, is_settled: bool) -> None:
        """Take note of what the sub-folder of that name is now: see `NamedAdapters.refresh`."""
        self.check_name(name)
        await self._named.refresh(name, is_settled=is_settled)

    async def warm(self) -> None:
        """Load what nobody has asked for yet, if that is little: few adapters, and room for all of them.

        One after the other, so that a loader stays free for requests.
        """
        unread = [known.info for known in self._named.known.values() if known.served is None]
        if len(unread) > _MAX_WARMED or sum(info.num_bytes for info in unread) > self._store.free_bytes:
            return
        for name in sorted(info.ref.name for info in unread):
            with contextlib.suppress(AdapterError):  # logged, and shown by `status`
                (await self._named.acquire(name)).release()

    def check(self) -> None:
        """Recompute what is counted while nothing is being loaded; raises AssertionError. For tests."""
        self._store.check()
        self._holders.check()
        self._remote.check()
        assert self._pins == self._named.pinned()

    # --- Small things -------------------------------------------------------------------------------------

    async def _load(self, name: str, origin: Origin, load_inplace: bool, is_pinned: bool) -> AdapterInfo:
        lease = await self._named.load(name, origin, load_inplace=load_inplace, is_pinned=is_pinned)
        lease.release()
        return lease.info

    async def _origin_of(self, path: str, source: str | None, token: str | None) -> Origin:
        """What an operator means. Raises AdapterInvalid for a source that is not allowed."""
        local = ChosenPath(self._source, path, self._sign)
        if source == LOCAL or (source is None and path.startswith(("/", ".", "~"))):
            return local
        remote = self._remote.accepting(path) if source is None else self._remote.get(source, path)
        if remote is None:
            return local
        there = RemotePlace(remote, path, self._sign, token)
        if source is None and "://" not in path and await self._is_there(local):
            return local
        return there

    async def _is_there(self, local: ChosenPath) -> bool:
        try:
            await asyncio.get_running_loop().run_in_executor(self._pool, local.locate)
        except (AdapterNotFound, AdapterInvalid):
            return False
        return True

    def _sub_folder(self, name: str) -> Origin:
        return SubFolder(self._source, name, self._sign)

    def _changed(self) -> None:
        """What names mean, or which are pinned."""
        self._listed = None
        pins = self._named.pinned()
        if pins != self._pins:
            self._pins = pins
            if self._on_pins is not None:
                self._on_pins(pins)


def is_adapter_name(name: str) -> bool:
    """Whether an adapter may be called so. Slashes part it, as in "org/adapter", but play no tricks."""
    return (
        0 < len(name) <= MAX_NAME_CHARS
        and name.isprintable()
        and "\\" not in name
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def _status(known: NamedAdapter) -> AdapterStatus:
    return AdapterStatus(
        info=known.info,
        is_loaded=known.served is not None,
        is_pinned=known.is_pinned,
        users=known.users,
        last_used=known.last_used,
        loads=known.loads,
        load_seconds=known.load_seconds,
        error=known.error,
    )
