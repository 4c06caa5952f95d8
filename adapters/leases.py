"""Who means which revision, and who uses it.

    holder (a name, a place in a remote, a merge) ── serves ──> revision <── copy in the store
                └── leases ── each pins the copy of the revision that was served when it was taken

A holder serves one revision at a time, and none while its weights are not in host memory. Requests take
leases; a lease keeps what it got to its end, whatever its holder serves meanwhile. A copy that no holder
serves any more goes with its last lease.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters.types import AdapterInfo, AdapterRef, Clock, Described, Revision

if TYPE_CHECKING:
    from adapters.store import AdapterStore


def describe(ref: AdapterRef, what: Described, *, root: str, source: str, created: float) -> AdapterInfo:
    """`created`: unix time."""
    return AdapterInfo(
        ref=ref,
        root=root,
        source=source,
        rank=what.rank,
        targets=what.target_names,
        num_bytes=what.num_bytes,
        created=int(created),
        kinds=what.kinds,
    )


@dataclass(frozen=True, slots=True)
class Served:
    """What a request gets: one revision whose weights are in host memory."""

    info: AdapterInfo
    invocation_tokens: tuple[int, ...] = ()
    extras: object | None = None


class Holder:
    """Something that requests may ask for, and what is known of its use. Changed by `Holders` alone."""

    __slots__ = ("is_pinned", "last_used", "load_seconds", "loads", "served", "users")

    def __init__(self) -> None:
        self.served: Served | None = None  # None: the weights are not in host memory
        self.is_pinned = False
        self.users = 0  # leases, of all revisions
        self.last_used: float | None = None  # unix time
        self.loads = 0
        self.load_seconds: float | None = None  # of the last load

    def count_load(self, seconds: float) -> None:
        self.loads += 1
        self.load_seconds = seconds


class AdapterLease:
    """The right to use one revision of an adapter until released: its weights stay in host memory."""

    __slots__ = ("_again", "_release", "extras", "info", "invocation_tokens", "ref")

    def __init__(
        self, served: Served, release: Callable[[], None], again: Callable[[], "AdapterLease"]
    ) -> None:
        """Takes over one pin of the revision, which `release` gives back."""
        self.ref: AdapterRef = served.info.ref
        self.info = served.info
        self.invocation_tokens = served.invocation_tokens  # (): active from the first token on
        self.extras = served.extras  # what `read_extras` made of the folder
        self._release: Callable[[], None] | None = release
        self._again = again

    def again(self) -> "AdapterLease":
        """Another lease of the same. This one must not have been released."""
        assert self._release is not None, "a lease of nothing"
        return self._again()

    def release(self) -> None:
        """On the event loop. Idempotent."""
        release, self._release = self._release, None
        if release is not None:
            release()


class Holders:
    """Who pins and discards copies, so that these books and the store's agree. Belongs to the event loop."""

    def __init__(self, store: "AdapterStore[Any]", now: Clock) -> None:
        """`now`: unix time."""
        self._store = store
        self._now = now
        self._serving: dict[Revision, set[Holder]] = {}
        self._num_leases = 0
        store.on_evicted = self._evicted

    def lease(self, holder: Holder) -> AdapterLease | None:
        """None: its weights are not in host memory."""
        return None if holder.served is None else self._lease(holder, holder.served)

    def serve(self, holder: Holder, served: Served) -> AdapterLease:
        """From now on the holder means this revision, which the caller has pinned; a lease of it.

        What it served before goes with the last lease, unless another holder serves it too.
        """
        before, holder.served = holder.served, served
        revision = served.info.ref.revision
        self._serving.setdefault(revision, set()).add(holder)
        lease = self._lease(holder, served)
        if holder.is_pinned:
            self._store.pin(revision)
        if before is not None:
            self._stop_serving(holder, before.info.ref.revision)
        return lease

    def forget(self, holder: Holder) -> None:
        """It means nothing any more; its leases live on."""
        before, holder.served = holder.served, None
        if before is not None:
            self._stop_serving(holder, before.info.ref.revision)
        holder.is_pinned = False

    def give_back(self, revision: Revision) -> None:
        """Unpin what was loaded. If nobody serves it, because it was not wanted any more, the copy goes."""
        if revision not in self._serving:
            self._store.discard(revision)
        self._store.unpin(revision)

    def pin(self, holder: Holder) -> None:
        """What it serves is not evicted, now and whatever it will be. Idempotent."""
        if not holder.is_pinned and holder.served is not None:
            self._store.pin(holder.served.info.ref.revision)
        holder.is_pinned = True

    def unpin(self, holder: Holder) -> None:
        """Idempotent."""
        if holder.is_pinned and holder.served is not None:
            self._store.unpin(holder.served.info.ref.revision)
        holder.is_pinned = False

    def check(self, num_loading: int = 0) -> None:
        """Recompute what is counted; raises AssertionError. `num_loading`: pins of loads under way."""
        for revision, holders in self._serving.items():
            assert holders
            assert self._store.is_loaded(revision)
            assert all(one.served and one.served.info.ref.revision == revision for one in holders)
        pinned = sum(one.is_pinned for holders in self._serving.values() for one in holders)
        assert self._store.total_pins() == self._num_leases + pinned + num_loading

    def _lease(self, holder: Holder, served: Served) -> AdapterLease:
        self._store.pin(served.info.ref.revision)
        self._num_leases += 1
        holder.users += 1
        holder.last_used = self._now()
        return AdapterLease(
            served,
            release=lambda: self._end(holder, served.info.ref.revision),
            again=lambda: self._lease(holder, served),
        )

    def _end(self, holder: Holder, revision: Revision) -> None:
        self._num_leases -= 1
        holder.users -= 1
        holder.last_used = self._now()
        self._store.unpin(revision)

    def _stop_serving(self, holder: Holder, revision: Revision) -> None:
        """It serves something else by now, or nothing."""
        is_still = holder.served is not None and holder.served.info.ref.revision == revision
        if not is_still:
            holders = self._serving[revision]
            holders.discard(holder)
            if not holders:
                del self._serving[revision]
                self._store.discard(revision)
        if holder.is_pinned:
            self._store.unpin(revision)

    def _evicted(self, revision: Revision) -> None:
        for holder in self._serving.pop(revision, ()):
            holder.served = None
