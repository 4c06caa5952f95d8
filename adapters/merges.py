"""Adapters that were made of others: built once, kept like host copies of files, never listed.

A merge is known by a key that says all about it, the revisions of its parts included; so what a key means
never changes. Its copy is evicted like any other, and built again when it is asked for.
"""

from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic

from adapters.flights import Flights
from adapters.leases import AdapterLease, Holder, Holders, Served, describe
from adapters.store import AdapterStore, W
from adapters.types import AdapterRef, Clock

_MAX_KNOWN = 256


class MergedAdapters(Generic[W]):
    """Belongs to the event loop."""

    def __init__(
        self, store: AdapterStore[W], holders: Holders, flights: Flights[AdapterLease], now: Clock
    ) -> None:
        """`now`: unix time."""
        self._store = store
        self._holders = holders
        self._flights = flights
        self._now = now
        self._known: OrderedDict[str, Holder] = OrderedDict()  # longest unused first

    async def derive(
        self, key: str, leases: Sequence[AdapterLease], build: Callable[[Sequence[W]], W]
    ) -> AdapterLease:
        """What `build` makes of the parts, in the loaders' pool. Raises what it raises, and NoRoom."""
        holder = self._known.get(key)
        if holder is not None:
            self._known.move_to_end(key)
            if (lease := self._holders.lease(holder)) is not None:
                return lease

        def begin() -> Coroutine[Any, Any, AdapterLease]:
            """The parts are held to the end, although who asked may leave and give them back."""
            return self._build(key, [lease.again() for lease in leases], build)

        return await self._flights.join(("merge", key), begin)

    async def _build(
        self, key: str, parts: Sequence[AdapterLease], build: Callable[[Sequence[W]], W]
    ) -> AdapterLease:
        try:
            weights = [self._store.get(part.ref.revision) for part in parts]
            num_bytes = max(one.num_bytes for one in weights)  # what comes out is not larger, as a rule
            merged = await self._store.load(num_bytes, lambda: build(weights))
        finally:
            for part in parts:
                part.release()
        try:
            ref = AdapterRef(key, merged.revision)
            info = describe(ref, merged, root=key, source=parts[0].info.source, created=self._now())
            return self._holders.serve(self._holder(key), Served(info, merged.invocation_tokens))
        finally:
            self._holders.give_back(merged.revision)

    def _holder(self, key: str) -> Holder:
        holder = self._known.setdefault(key, Holder())
        self._known.move_to_end(key)
        idle = [known for known, one in self._known.items() if not one.users and one is not holder]
        for known in idle[: max(0, len(self._known) - _MAX_KNOWN)]:
            self._holders.forget(self._known.pop(known))
        return holder
