"""Adapters that requests name by their place in a remote: a hub id, an s3:// location.

    acquire(source, location, token) ── resolve, with this token ──> version ── loaded ─────────> lease
                                                                       └─ else fetch, load ──> lease

The remote is asked for every request, with the request's own token: that is the access check, and nothing
that another token has brought here is served without it. An entry is known by source and location, so a hub
id is never taken for a local name. Entries are not listed: what one client may see is not for others. How
many there are is bounded; the one that was used longest ago goes first.
"""

import asyncio
import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from adapters.errors import AdapterInvalid, AdapterNotFound
from adapters.failures import Failures
from adapters.flights import Flights
from adapters.leases import AdapterLease, Holder, Holders, Served, describe
from adapters.names import shown
from adapters.origins import Place, Sign, look_at
from adapters.reader import AdapterReader
from adapters.sources.remote import RemoteSource
from adapters.types import AdapterRef, Clock

_MAX_ENTRIES = 1024
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Entry:
    """One version of one location."""

    version: str
    holder: Holder = field(default_factory=Holder)


class RemoteAdapters:
    """Belongs to the event loop."""

    def __init__(
        self,
        remotes: Mapping[str, RemoteSource],
        reader: AdapterReader[Any],
        holders: Holders,
        flights: Flights[AdapterLease],
        failures: Failures,
        *,
        sign: Sign,
        askers: Executor,
        fetchers: Executor,
        now: Clock,
        on_loaded: Callable[[str, float], None],
    ) -> None:
        """`askers`, `fetchers`: where remotes are asked, and fetched from. `now`: unix time. `on_loaded` gets
        the location and the seconds of each load."""
        self._remotes = remotes
        self._sign = sign
        self._reader = reader
        self._holders = holders
        self._flights = flights
        self._failures = failures
        self._askers = askers
        self._fetchers = fetchers
        self._now = now
        self._on_loaded = on_loaded
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()  # longest unused first
        self._salt = secrets.token_bytes(16)

    def get(self, source: str, location: str) -> RemoteSource:
        """The remote that a client means by `source`. Raises AdapterInvalid."""
        remote = self._remotes.get(source)
        if remote is None:
            raise AdapterInvalid(f"adapters from {shown(source)} are not allowed on this server")
        if not remote.accepts(location):
            raise AdapterInvalid(f"{shown(location)} is not a location of {source}")
        return remote

    def accepting(self, location: str) -> RemoteSource | None:
        """The remote that has locations written like this one."""
        return next((remote for remote in self._remotes.values() if remote.accepts(location)), None)

    async def acquire(self, remote: RemoteSource, location: str, token: str | None) -> AdapterLease:
        """What the location means now, held until released. Raises AdapterError, also if the token may not
        see it.
        """
        who = self._digest(token)
        ask = partial(remote.resolve, location, token)
        version = await self._ask(("resolve", remote.name, location, who), None, self._askers, ask)
        lease = self._lease(remote, location, version)
        while lease is None:
            begun: list[None] = []  # holds something when the work is this request's own
            work = partial(self._bring, remote, location, version, token, begun)
            try:
                lease = await self._flights.join((remote.name, location, version), work)
            except AdapterNotFound:
                if begun:
                    raise
                # another token was refused the files: that says nothing about this one
        return lease

    def check(self) -> None:
        """Raises AssertionError. For tests."""
        idle = [entry for entry in self._entries.values() if not entry.holder.users]
        assert len(idle) <= _MAX_ENTRIES

    def _lease(self, remote: RemoteSource, location: str, version: str) -> AdapterLease | None:
        entry = self._entries.get((remote.name, location))
        if entry is None or entry.version != version:
            return None
        self._entries.move_to_end((remote.name, location))
        return self._holders.lease(entry.holder)

    async def _bring(
        self, remote: RemoteSource, location: str, version: str, token: str | None, begun: list[None]
    ) -> AdapterLease:
        """Fetch and load what is not here."""
        begun.append(None)
        lease = self._lease(remote, location, version)
        if lease is not None:
            return lease
        key = ("fetch", remote.name, location, self._digest(token))
        fetch = partial(self._fetch, remote, location, version, token)
        place = await self._ask(key, version, self._fetchers, fetch)
        arrived = await self._reader.read((remote.name, location, version), place)
        weights = arrived.weights
        try:
            ref = AdapterRef(location, weights.revision)
            info = describe(ref, weights, root=location, source=remote.name, created=self._now())
            entry = self._enter((remote.name, location), version)
            entry.holder.count_load(arrived.seconds)
            self._on_loaded(location, arrived.seconds)
            return self._holders.serve(entry.holder, Served(info, weights.invocation_tokens, arrived.extras))
        finally:
            self._holders.give_back(weights.revision)

    def _enter(self, key: tuple[str, str], version: str) -> _Entry:
        """The entry of a version; another version's goes with its last lease, and so do the idlest ones."""
        entry = self._entries.get(key)
        if entry is None or entry.version != version:
            if entry is not None:
                self._holders.forget(entry.holder)
            entry = self._entries[key] = _Entry(version)
        self._entries.move_to_end(key)
        num_beyond = len(self._entries) - _MAX_ENTRIES
        idle = [known for known, one in self._entries.items() if not one.holder.users and one is not entry]
        for known in idle[: max(0, num_beyond)]:
            self._holders.forget(self._entries.pop(known).holder)
        return entry

    def _fetch(self, remote: RemoteSource, location: str, version: str, token: str | None) -> Place:
        """In the pool."""
        return look_at(remote.fetch(location, version, token), self._sign, location, remote.name)

    async def _ask(self, key: Hashable, signature: Hashable, pool: Executor, work: Callable[[], T]) -> T:
        """In the pool. A remote that said no, or nothing, is left alone for a while by the same token."""
        loop = asyncio.get_running_loop()
        return await self._failures.attempt(key, signature, lambda: loop.run_in_executor(pool, work))

    def _digest(self, token: str | None) -> bytes:
        """Tells tokens apart without keeping them."""
        if token is None:
            return b""
        return hashlib.blake2b(token.encode("utf-8", "surrogatepass"), key=self._salt).digest()
