"""The names that adapters are registered under: how one comes to mean a revision, and another one later.

    unknown ── outline ──> known, unread ── read ──> served ── files change, read ──> served, another revision
                                  ^                    │ evicted
                                  └────────────────────┘

Whoever reads files for a name remembers what the name meant at the begin. If it means something else when
the reading is over (unloaded, replaced, files that changed), what was read is given up and it begins again.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

from adapters.errors import AdapterError, AdapterInvalid, AdapterNotFound, AdapterUnavailable
from adapters.failures import Failures
from adapters.flights import Flights
from adapters.leases import AdapterLease, Holder, Holders, Served, describe
from adapters.names import shown
from adapters.origins import Origin, Place
from adapters.reader import AdapterReader, Arrived
from adapters.signature import Signature
from adapters.store import AdapterStore, NoRoom
from adapters.types import UNREAD, AdapterInfo, AdapterRef, Clock, Outline, Revision

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Meaning:
    """What a name stands for; another object whenever that is set anew."""

    info: AdapterInfo
    origin: Origin
    signature: Signature  # of the files that `info` describes


class NamedAdapter(Holder):
    """A registered name."""

    __slots__ = ("error", "meaning")

    def __init__(self, meaning: Meaning) -> None:
        super().__init__()
        self.meaning = meaning
        self.error: str | None = None  # why its files could not be loaded last time

    @property
    def info(self) -> AdapterInfo:
        return self.meaning.info

    @property
    def is_servable(self) -> bool:
        """Not known to be broken, or broken only since it was loaded."""
        return self.error is None or self.info.revision is not None


class NamedAdapters:
    """Belongs to the event loop."""

    def __init__(
        self,
        store: AdapterStore[Any],
        reader: AdapterReader[Any],
        holders: Holders,
        flights: Flights[AdapterLease],
        failures: Failures,
        *,
        by_name: Callable[[str], Origin],
        pool: Executor,
        fetchers: Executor,
        now: Clock,
        on_change: Callable[[], None],
        on_loaded: Callable[[str, float], None],
    ) -> None:
        """`by_name`: where a name that nobody registered is looked for. `pool`, `fetchers`: where origins are
        asked. `now`: unix time. `on_change`: after what a name means or whether it can be served. `on_loaded`
        gets the name and the seconds of each load."""
        self.known: dict[str, NamedAdapter] = {}
        self._store = store
        self._reader = reader
        self._holders = holders
        self._flights = flights
        self._failures = failures
        self._by_name = by_name
        self._pool = pool
        self._fetchers = fetchers
        self._now = now
        self._on_change = on_change
        self._on_loaded = on_loaded
        self._pinned: set[str] = set()

    # --- Use ----------------------------------------------------------------------------------------------

    def lease(self, name: str) -> AdapterLease | None:
        """None: unknown, or not in host memory."""
        known = self.known.get(name)
        return None if known is None else self._holders.lease(known)

    async def acquire(self, name: str) -> AdapterLease:
        """Read the files of a name that is unknown, unread or evicted. Raises AdapterError."""
        return await self._flights.join(("name", name), partial(self._arrive, name))

    def bring(self, name: str) -> None:
        """Begin to read its files, for whoever comes later. A failure is logged."""
        self._flights.begin(("name", name), partial(self._arrive, name))

    async def _arrive(self, name: str) -> AdapterLease:
        """Let the name mean what its files are now. What it means when they were read decides."""
        while True:
            known = self.known.get(name)
            meaning = self._meaning(name)
            origin = self._by_name(name) if meaning is None else meaning.origin
            place = await self._locate(name, origin)
            if self._meaning(name) is meaning:
                if place is None:
                    if known is not None:
                        self.forget(name)
                    raise unknown_adapter(name)
                try:
                    arrived = await self._read_beside(known, place)
                except AdapterError as error:
                    if self._meaning(name) is meaning:
                        self._failed(name, error)
                        raise
                else:
                    try:
                        if self._meaning(name) is meaning:
                            return self._enter(name, origin, place, arrived)
                    finally:
                        self._holders.give_back(arrived.weights.revision)
            if (lease := self.lease(name)) is not None:
                return lease

    async def _locate(self, name: str, origin: Origin) -> Place | None:
        """For a request. Raises AdapterError, never with an operator's path.

        A remote that did not give the files is left alone for a while.
        """
        ask = partial(self._ask, origin)
        try:
            return await (self._failures.attempt(("origin", name), None, ask) if origin.is_remote else ask())
        except (AdapterNotFound, AdapterInvalid) as error:
            if origin.root is None:
                raise
            raise AdapterNotFound(f"the files of adapter {shown(name)} are not there any more") from error

    async def _read_beside(self, known: NamedAdapter | None, place: Place) -> Arrived[Any]:
        """Read, while what the name means now stays loaded; unless there is no room for both."""
        is_outlined = known is not None and known.meaning.signature == place.signature
        num_bytes = known.info.num_bytes if known is not None and is_outlined else None
        read = partial(self._reader.read, ("files", place.folder), place, num_bytes=num_bytes)
        if known is None or known.served is None:
            return await read()
        revision = known.served.info.ref.revision
        self._store.pin(revision)
        try:
            return await read()
        except NoRoom:
            pass
        finally:
            self._holders.give_back(revision)
        return await read()

    # --- Administration -----------------------------------------------------------------------------------

    async def load(self, name: str, origin: Origin, *, load_inplace: bool, is_pinned: bool) -> AdapterLease:
        """Register what an operator says; the same again changes nothing. Raises AdapterError."""
        return await self._flights.run(partial(self._load, name, origin, load_inplace, is_pinned))

    async def refresh(self, name: str, *, is_settled: bool) -> None:
        """Take note of what lies under this name now: a new adapter is registered by its outline, one whose
        files have changed is loaded again if it is loaded, and one that is gone is forgotten.

        `is_settled`: the files have not been written to for a while, so that what is wrong with them is
        wrong. Raises AdapterError; then the name means what it meant before.
        """
        try:
            while not await self._refresh(name):
                pass
        except AdapterError as error:
            if is_settled:
                self._failed(name, error)
            raise

    def forget(self, name: str) -> NamedAdapter:
        """The name means nothing any more, at once; its weights go when their last lease ends."""
        known = self.known.pop(name)
        self._pinned.discard(name)
        self._holders.forget(known)
        self._on_change()
        return known

    def pin(self, name: str) -> AdapterInfo:
        """Its weights stay in host memory, whatever they will be. Raises AdapterNotFound."""
        known = self._get(name)
        self._holders.pin(known)
        self._pinned.add(name)
        self._on_change()
        if known.served is None:
            self.bring(name)
        return known.info

    def unpin(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFound."""
        known = self._get(name)
        self._holders.unpin(known)
        self._pinned.discard(name)
        self._on_change()
        return known.info

    def pinned(self) -> frozenset[AdapterRef]:
        """Those that are in host memory."""
        served = (self.known[name].served for name in self._pinned)
        return frozenset(one.info.ref for one in served if one is not None)

    async def _load(self, name: str, origin: Origin, load_inplace: bool, is_pinned: bool) -> AdapterLease:
        place = await self._ask(origin)
        if place is None:  # a sub-folder that somebody has removed a moment ago
            raise unknown_adapter(name)
        known = self.known.get(name)
        if known is None or not _is_of(known, origin, place) or (lease := self.lease(name)) is None:
            arrived = await self._reader.read(("files", place.folder), place, anew=True)
            revision = arrived.weights.revision
            try:
                known = self.known.get(name)
                if not (known is None or load_inplace or _is_same(known, origin, place, revision)):
                    raise AdapterInvalid(
                        f"adapter {shown(name)} is loaded with other content; load_inplace would replace it"
                    )
                lease = self._enter(name, origin, place, arrived)
            finally:
                self._holders.give_back(revision)
        if is_pinned:
            self.pin(name)
        return lease

    async def _refresh(self, name: str) -> bool:
        """Whether there is nothing left to do. Raises AdapterError."""
        origin = self._by_name(name)
        place = await self._ask(origin)
        known = self.known.get(name)
        is_ours = known is not None and known.meaning.origin == origin
        if place is None:
            if is_ours:
                self.forget(name)
            return True
        if known is not None:
            signature = known.meaning.signature
            if signature == place.signature or not (is_ours or signature.folder == place.signature.folder):
                return True  # as it was, or registered from elsewhere
            if known.served is not None or known.is_pinned:
                (await self.acquire(name)).release()
                return False
        meaning = None if known is None else known.meaning
        self._failures.repeat(("files", place.folder), place.signature)  # asked for before it was found
        outline = await self._reader.outline(place.folder)
        if self._meaning(name) is meaning:
            self._note(name, origin if meaning is None else meaning.origin, place, outline)
            return True
        return False

    # --- State --------------------------------------------------------------------------------------------

    def _enter(self, name: str, origin: Origin, place: Place, arrived: Arrived[Any]) -> AdapterLease:
        """Make the name mean what was read."""
        weights = arrived.weights
        known = self.known.get(name)
        before = None if known is None else known.info
        is_same = before is not None and before.revision == weights.revision
        is_first = before is not None and before.revision is None
        ref = AdapterRef(name, weights.revision)
        created = before.created if before is not None and (is_same or is_first) else self._now()
        info = describe(ref, weights, root=place.root, source=place.source, created=created)
        meaning = Meaning(before if before == info else info, origin, place.signature)
        known = self._set(name, meaning)
        known.count_load(arrived.seconds)
        self._failures.forget(("origin", name))
        lease = self._holders.serve(known, Served(meaning.info, weights.invocation_tokens, arrived.extras))
        self._on_change()
        self._on_loaded(name, arrived.seconds)
        if not is_same:
            logger.info(
                "adapter %s: revision %s, rank %d, %d bytes",
                shown(name),
                weights.revision,
                info.rank,
                info.num_bytes,
            )
        return lease

    def _note(self, name: str, origin: Origin, place: Place, outline: Outline) -> None:
        """Files that nobody has read: the name is known by its outline."""
        known = self.known.get(name)
        created = self._now() if known is None else known.info.created
        ref = AdapterRef(name, UNREAD)
        info = describe(ref, outline, root=place.root, source=place.source, created=created)
        self._set(name, Meaning(info, origin, place.signature))
        self._on_change()
        logger.debug("adapter %s: found, rank %d, %d bytes", shown(name), info.rank, info.num_bytes)

    def _set(self, name: str, meaning: Meaning) -> NamedAdapter:
        known = self.known.get(name)
        if known is None:
            known = self.known[name] = NamedAdapter(meaning)
        known.meaning = meaning
        known.error = None
        return known

    def _failed(self, name: str, error: AdapterError) -> None:
        """Say once what is wrong with the files of a known name."""
        known = self.known.get(name)
        if known is None or known.error == error.message or isinstance(error, AdapterUnavailable):
            return
        known.error = error.message
        self._on_change()
        kept = "" if known.served is None else "; the revision before is still served"
        logger.warning("adapter %s: its files cannot be loaded: %s%s", shown(name), error.message, kept)

    def _meaning(self, name: str) -> Meaning | None:
        known = self.known.get(name)
        return None if known is None else known.meaning

    def _get(self, name: str) -> NamedAdapter:
        known = self.known.get(name)
        if known is None:
            raise unknown_adapter(name)
        return known

    async def _ask(self, origin: Origin) -> Place | None:
        pool = self._fetchers if origin.is_remote else self._pool
        return await asyncio.get_running_loop().run_in_executor(pool, origin.locate)


def unknown_adapter(name: str) -> AdapterNotFound:
    """What `acquire` raises for a name that nothing has."""
    return AdapterNotFound(f"there is no adapter {shown(name)}")


def _is_of(known: NamedAdapter, origin: Origin, place: Place) -> bool:
    """Whether the name was made of these very files, by this way to them."""
    return known.meaning.origin == origin and known.meaning.signature == place.signature


def _is_same(known: NamedAdapter, origin: Origin, place: Place, revision: Revision) -> bool:
    """Whether an operator who says this means what the name means already, as far as anybody can tell."""
    if known.info.revision is not None:
        return known.info.revision == revision
    return known.meaning.origin == origin or known.meaning.signature == place.signature
