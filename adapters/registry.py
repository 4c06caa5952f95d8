"""Names of adapters, and who uses what they mean.

    acquire(name) ── known and loaded ────────────────────────────────────────────> lease      no suspension
                  └─ else ──> locate (pool) ──> store.load (pool) ──> registered ──> lease

A name means one revision at a time; a lease keeps the revision that the name meant when it was taken, to
its end. A name appears only after its files were loaded. The store may evict what nobody uses: then the
name stays, and the next `acquire` reads its files again, which may be another revision by then. Two names
of one revision share its weights.

All state changes on the event loop, in steps that do not suspend; only the file work is in the pool. Work
that was begun is finished in a task of its own: a client that leaves, or is told to come back later, finds
it done.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from adapters.errors import AdapterError, AdapterInvalid, AdapterNotFound, AdapterUnavailable
from adapters.names import shown
from adapters.types import AdapterInfo, AdapterRef, Revision

if TYPE_CHECKING:
    from adapters.store import AdapterStore, Weights

logger = logging.getLogger(__name__)

MAX_NAME_CHARS = 256
_LOCAL = "local"
_RETRY_AFTER_S = 10  # said while shutting down: until another server is there
T = TypeVar("T")


class Source(Protocol):
    """Where the folders of adapters are found. All methods read the file system and run in the pool."""

    def find(self, name: str) -> Path | None:
        """The folder of the adapter of that name, or None. Raises AdapterError."""
        ...

    def check_path(self, path: str) -> Path:
        """The folder at a path that a client chose. Raises AdapterError if it is not there or not allowed."""
        ...

    def names(self) -> tuple[str, ...]:
        """All names that `find` finds."""
        ...


class AdapterLease:
    """The right to use one revision of an adapter until released: its weights stay in host memory."""

    __slots__ = ("_unpin", "extras", "info", "invocation_tokens")

    def __init__(self, info: AdapterInfo, unpin: Callable[[Revision], None]) -> None:
        """Takes over one pin of the revision."""
        self.info = info
        self.invocation_tokens: tuple[int, ...] = ()
        self.extras: object | None = None
        self._unpin: Callable[[Revision], None] | None = unpin

    @property
    def ref(self) -> AdapterRef:
        return self.info.ref

    def release(self) -> None:
        """On the event loop. Idempotent."""
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin(self.ref.revision)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a name's files are; asked again before every load, because folders and links change."""

    locate: Callable[[], Path | None]  # in the pool; raises AdapterError
    root: str | None = None  # as the operator gave it; None: found by its name


@dataclass(frozen=True, slots=True)
class _Entry:
    """A registered name."""

    info: AdapterInfo
    origin: _Origin


class AdapterRegistry:
    """Belongs to the event loop. May be made on another thread."""

    def __init__(
        self,
        store: "AdapterStore[Any]",
        source: Source,
        pool: Executor,
        *,
        reserved: frozenset[str] = frozenset(),
        now: Callable[[], float] = time.time,
    ) -> None:
        """`reserved`: names that mean the base model. `now`: unix time."""
        self._store = store
        self._source = source
        self._pool = pool
        self._reserved = reserved
        self._now = now
        self._entries: dict[str, _Entry] = {}
        self._listed: tuple[AdapterInfo, ...] | None = ()  # None: has to be made again
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- What there is ------------------------------------------------------------------------------------

    def list(self) -> tuple[AdapterInfo, ...]:
        """Sorted by name."""
        if self._listed is None:
            self._listed = tuple(self._entries[name].info for name in sorted(self._entries))
        return self._listed

    def get(self, name: str) -> AdapterInfo | None:
        entry = self._entries.get(name)
        return None if entry is None else entry.info

    def is_loaded(self, ref: AdapterRef) -> bool:
        """Whether the weights are in host memory."""
        return self._store.is_loaded(ref.revision)

    # --- Use ----------------------------------------------------------------------------------------------

    async def acquire(
        self, name: str, *, source: str | None = None, token: str | None = None
    ) -> AdapterLease:
        """The adapter of that name, held until released. Does not suspend if it is loaded.

        A name that is not registered is looked for in the source, so that adapters may be added while the
        server runs. Raises AdapterNotFound, or what `AdapterStore.load` raises.
        """
        if source not in (None, _LOCAL):
            raise AdapterInvalid(f"adapters from {shown(source)} are not served here")
        lease = self._lease_of_loaded(name)
        if lease is not None:
            return lease
        if not is_adapter_name(name) or name in self._reserved:
            raise unknown_adapter(name)
        return await self._finish(self._arrive(name), _give_back)

    def _lease_of_loaded(self, name: str) -> AdapterLease | None:
        entry = self._entries.get(name)
        if entry is None or not self.is_loaded(entry.info.ref):
            return None
        self._store.pin(entry.info.ref.revision)
        return self._lease(entry)

    def _lease(self, entry: _Entry) -> AdapterLease:
        return AdapterLease(entry.info, self._store.unpin)

    async def derive(
        self, key: str, leases: Sequence[AdapterLease], build: Callable[[Sequence[Any]], Any]
    ) -> AdapterLease:
        """The adapter that `build` makes of those of the leases, made once for each key and never listed."""
        parts = [self._store.get(lease.ref.revision) for lease in leases]

        async def make() -> AdapterLease:
            weights = await self._store.make(key, lambda: build(parts))
            ref = AdapterRef(key, weights.revision)
            info = AdapterInfo(
                ref=ref,
                root="",
                source=leases[0].info.source,
                rank=weights.rank,
                targets=weights.target_names,
                num_bytes=weights.num_bytes,
                created=int(self._now()),
                kinds=("merged",),
            )
            return AdapterLease(info, self._store.unpin)

        return await self._finish(make(), _give_back)

    async def _arrive(self, name: str) -> AdapterLease:
        """Load a name that is unknown or evicted. What it means when its files were read decides."""
        while (lease := self._lease_of_loaded(name)) is None:
            entry = self._entries.get(name)
            origin = _Origin(partial(self._source.find, name)) if entry is None else entry.origin
            folder = await self._locate(name, origin, entry)
            if (lease := self._lease_of_loaded(name)) is not None:
                break  # somebody else was faster
            weights = await self._store.load(folder)
            current = self._entries.get(name)
            if current is entry and (entry is None or entry.info.ref.revision != weights.revision):
                current = self._enter(name, origin, folder, weights)
            if current is not None and current.info.ref.revision == weights.revision:
                return self._lease(current)
            self._store.unpin(weights.revision)  # unloaded or replaced meanwhile: begin again
        return lease

    async def _locate(self, name: str, origin: _Origin, entry: _Entry | None) -> Path:
        """The folder to load for a request. Raises AdapterError, never with an operator's path."""
        try:
            folder = await self._in_pool(origin.locate)
        except (AdapterNotFound, AdapterInvalid) as error:
            if origin.root is None:
                raise
            raise AdapterNotFound(f"the files of adapter {shown(name)} are not there any more") from error
        if folder is not None:
            return folder
        if entry is not None and self._entries.get(name) is entry:
            self._forget(name)
        raise unknown_adapter(name)

    # --- Administration -----------------------------------------------------------------------------------

    async def load(self, name: str, path: str, *, load_inplace: bool = False) -> AdapterInfo:
        """Register the adapter at a path under a name; `load_inplace` replaces what the name meant.

        Requests that run keep the revision they have. The same content again changes nothing, except that a
        name follows it to another folder. A load that was begun is finished even if the caller is
        cancelled.

        Raises AdapterError: for a name that is not allowed, a path outside the roots, files that cannot be
        served, and other content than the name has.
        """
        origin = _Origin(partial(self._source.check_path, path), path)
        return await self._finish(self._load(name, origin, load_inplace), _report)

    async def register(self, name: str, folder: Path) -> AdapterInfo:
        """Register a folder that the operator named at the start; it may be anywhere. Raises AdapterError."""
        origin = _Origin(lambda: folder, str(folder))
        return await self._finish(self._load(name, origin, load_inplace=False), _report)

    async def unload(self, name: str) -> bool:
        """Forget the name at once; False if it was not known. The weights go when their last lease ends.

        A sub-folder of the adapters folder is found again by the next `acquire` of its name, as it is by
        vLLM with a resolver: unloading frees memory, or makes changed files count. Who wants to retire such
        an adapter removes its folder first and then unloads it.
        """
        if name not in self._entries:
            return False
        self._forget(name)
        logger.info("adapter %s: unloaded", shown(name))
        return True

    async def scan(self) -> None:
        """Register all adapters that the source has. One that cannot be loaded is logged and left out.

        One after the other, so that the pool stays free for requests; these find what the scan has not
        reached.
        """
        for name in await self._in_pool(self._source.names):
            if name in self._entries:
                continue
            try:
                self._check_name(name)
                lease = await self._finish(self._arrive(name), _give_back)
            except AdapterError as error:
                logger.warning("adapter %s: left out: %s", shown(name), error.message)
            else:
                lease.release()

    async def close(self) -> None:
        """Give up what is still being loaded; what the pool has begun to read is read to its end."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _load(self, name: str, origin: _Origin, load_inplace: bool) -> AdapterInfo:
        self._check_name(name)
        folder = await self._in_pool(origin.locate)
        assert folder is not None, "a path is found or refused"
        weights = await self._store.load(folder, anew=True)
        try:
            known = self._entries.get(name)
            is_same = known is not None and known.info.ref.revision == weights.revision
            if known is not None and not is_same and not load_inplace:
                raise AdapterInvalid(
                    f"adapter {shown(name)} is loaded with other content; load_inplace would replace it"
                )
            if known is None or not is_same or known.info.root != origin.root:
                known = self._enter(name, origin, folder, weights)
            return known.info
        finally:
            self._store.unpin(weights.revision)

    # --- State --------------------------------------------------------------------------------------------

    def _enter(self, name: str, origin: _Origin, folder: Path, weights: "Weights") -> _Entry:
        """Make the name mean these weights, which the caller has pinned."""
        known = self._entries.get(name)
        is_same = known is not None and known.info.ref.revision == weights.revision
        info = AdapterInfo(
            ref=AdapterRef(name, weights.revision),
            root=str(folder) if origin.root is None else origin.root,
            source=_LOCAL,
            rank=weights.rank,
            targets=weights.target_names,
            num_bytes=weights.num_bytes,
            created=known.info.created if known is not None and is_same else int(self._now()),
        )
        if known is not None and not is_same:
            self._forget(name)
        entry = self._entries[name] = _Entry(info, origin)
        self._listed = None
        logger.info(
            "adapter %s: revision %s, rank %d, %d bytes",
            shown(name),
            weights.revision,
            info.rank,
            info.num_bytes,
        )
        return entry

    def _forget(self, name: str) -> None:
        """The name means nothing any more; its weights go unless another name means them too."""
        revision = self._entries.pop(name).info.ref.revision
        self._listed = None
        if all(entry.info.ref.revision != revision for entry in self._entries.values()):
            self._store.discard(revision)

    # --- Small things -------------------------------------------------------------------------------------

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _finish(self, work: Coroutine[Any, Any, T], if_alone: Callable[[asyncio.Task[T]], object]) -> T:
        """Run in a task that goes on when the caller is cancelled; then its end is for `if_alone`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            task.add_done_callback(if_alone)
            raise
        if task.cancelled():
            raise AdapterUnavailable("the server is shutting down", retry_after_s=_RETRY_AFTER_S)
        return task.result()

    def _check_name(self, name: str) -> None:
        """Raises AdapterInvalid for a name that no adapter may have."""
        if not is_adapter_name(name):
            raise AdapterInvalid(f"{shown(name)} cannot be the name of an adapter")
        if name in self._reserved:
            raise AdapterInvalid(f"{shown(name)} is a name of the base model")


def is_adapter_name(name: str) -> bool:
    """Whether an adapter may be called so. Slashes part it, as in "org/adapter", but play no tricks."""
    return (
        0 < len(name) <= MAX_NAME_CHARS
        and name.isprintable()
        and "\\" not in name
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def unknown_adapter(name: str) -> AdapterNotFound:
    """What `acquire` raises for a name that nothing has."""
    return AdapterNotFound(f"there is no adapter {shown(name)}")


def _report(task: asyncio.Task[Any]) -> bool:
    """Whether it succeeded, where nobody waits any more. A bug of ours must not go unseen."""
    if task.cancelled():
        return False
    error = task.exception()
    if error is not None and not isinstance(error, AdapterError):
        logger.error("loading an adapter failed in an unforeseen way", exc_info=error)
    return error is None


def _give_back(arrival: asyncio.Task[AdapterLease]) -> None:
    """Release the lease that nobody waits for any more."""
    if _report(arrival):
        arrival.result().release()
