"""Which adapters may be used in this step: room in the arena, patience, and the orders for the device.

The scheduler asks twice. `is_open_to` is cheap and comes before the search for blocks; `enter` may evict,
place and compact, and comes last, when nothing else can keep the sequence out. Whoever entered leaves again
when it stops running, for whatever reason.

A sequence that only its adapter keeps waiting is skipped, so that others pass it. That alone would let the
adapters that are resident keep the arena for ever. Hence *patience*:

    waits longer than patience_s ──> its adapters *claim* the arena: no others are placed meanwhile, and
                                     one resident adapter is *closed*: nobody enters with it any more
    closed one has no users left ──> it can be evicted. If that is room enough, the claimer enters and
                                     all are open again.
                                     If not, the next one is closed too.

Nobody starves: sequences are finite, so a closed adapter empties; the adapters that are resident during a
claim are a fixed set, so after finitely many closings there is room; and claims are made in the order of
admission. An adapter is not closed before it has been resident for patience_s itself: under overload the
arena changes hands in slices of at least that length, instead of once per sequence.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from adapters.placement import AdapterPlacement
from adapters.types import AdapterRef, AdapterWrite, Clock, Placed, Revision
from server.engine.plan import ScheduledChunk, StepPlan
from server.engine.sequence import Sequence, SequenceId


class AdapterGate:
    """Owned by the scheduler."""

    def __init__(
        self,
        placement: AdapterPlacement,
        num_bytes: Callable[[AdapterRef], int],
        patience_s: float,
        clock: Clock,
    ) -> None:
        self.placement = placement
        self._num_bytes = num_bytes
        self._patience_s = patience_s
        self._clock = clock
        self._inside: dict[SequenceId, Sequence] = {}  # sequences that use their adapter
        self._placed_at: dict[Revision, float] = {}
        self._claimer: Sequence | None = None
        self._claimed: frozenset[Revision] = frozenset()  # its adapters
        self._closed: dict[Revision, AdapterRef] = {}  # on behalf of the claim
        self._no_room: set[Revision] = set()  # placing failed in this step; not tried again before the next
        self._orders = DeviceOrders()

    def begin_step(self) -> None:
        self._no_room.clear()

    def fits(self, sequence: Sequence) -> bool:
        """Whether its adapters fit into the arena at all, all at once."""
        return self.placement.fit(self._num_bytes(ref) for ref in _refs(sequence))

    def is_open_to(self, sequence: Sequence) -> bool:
        """Whether its adapters are there, or might be placed if the sequence could start now."""
        for ref in _refs(sequence):
            if ref.revision in self._closed:
                return self._keep_waiting(sequence)
            if self.placement.is_resident(ref):
                continue
            is_claimed_by_others = self._claimer is not None and ref.revision not in self._claimed
            if ref.revision in self._no_room or is_claimed_by_others:
                return self._keep_waiting(sequence)
        return True

    def enter(self, sequence: Sequence) -> bool:
        """Make its adapters resident and hold them there. False: there is no room now."""
        held: list[AdapterRef] = []
        for ref in _refs(sequence):
            if not self.placement.is_resident(ref) and not self._place(ref):
                for other in held:
                    self.placement.release(other)
                return self._keep_waiting(sequence)
            self.placement.acquire(ref)
            held.append(ref)
        if held:
            self._inside[sequence.id] = sequence
        if self._claimer is not None and self._claimed <= {ref.revision for ref in held}:
            self._end_claim()
        sequence.adapter_wait_since = None
        return True

    def leave(self, sequence: Sequence) -> None:
        """The sequence does not run any more."""
        if self._inside.pop(sequence.id, None) is not None:
            for ref in _refs(sequence):
                self.placement.release(ref)

    def give_up(self, sequence: Sequence) -> None:
        """The sequence does not wait any more, or is paused: what was claimed for it is given back."""
        sequence.adapter_wait_since = None
        if self._claimer is sequence:
            self._end_claim()

    def orders_for(
        self, chunks: Iterable[ScheduledChunk]
    ) -> tuple[tuple[AdapterRef, ...], tuple[AdapterWrite, ...]]:
        """Evictions and writes that the plan of these chunks must carry."""
        return self._orders.for_revisions({ref.revision for chunk in chunks for ref in _refs(chunk.sequence)})

    def confirm(self, plan: StepPlan) -> None:
        """The device has carried the plan's orders out."""
        self._orders.confirm(plan.writes)

    def doubt(self) -> None:
        """The step failed: nobody knows which of its orders were carried out."""
        self._orders.doubt()

    def check(self, running: Iterable[Sequence]) -> None:
        """Recompute the users of each adapter from the running sequences, and the state of the claim."""
        self.placement.check()
        assert all(sequence.adapter_wait_since is None for sequence in self._inside.values()), "patience"
        assert set(self._inside) == {s.id for s in running if s.adapter is not None}, "inside"
        residents = {ref.revision: ref for ref in self.placement.resident()}
        for revision, ref in residents.items():
            users = len(self._users(revision))
            assert users == self.placement.users(ref), "users"
        assert set(self._placed_at) == set(residents), "placed_at"
        assert self._orders.in_doubt <= set(residents), "in doubt but not resident"
        assert set(self._closed) <= set(residents), "closed but not resident"
        assert (self._claimer is None) == (not self._claimed), "claim without claimer"
        assert self._claimer is not None or not self._closed, "closed without claim"
        assert self._claimed.isdisjoint(self._closed), "closed for itself"

    def _place(self, ref: AdapterRef) -> bool:
        placed = self.placement.place(ref, self._num_bytes(ref))
        if placed is None:
            self._no_room.add(ref.revision)
            return False
        for evicted in placed.evicted:
            del self._placed_at[evicted.revision]
            self._closed.pop(evicted.revision, None)
        self._placed_at[ref.revision] = self._clock()
        self._orders.add(placed)
        return True

    def _keep_waiting(self, sequence: Sequence) -> bool:
        """Note since when, and let impatience act. Always False, for the callers' return."""
        now = self._clock()
        if sequence.adapter_wait_since is None:
            sequence.adapter_wait_since = now
        if self._claimer is None and now - sequence.adapter_wait_since >= self._patience_s:
            self._claimer = sequence
            self._claimed = frozenset(ref.revision for ref in _refs(sequence))
        if self._claimer is sequence:
            self._close_one(now)
        return False

    def _close_one(self, now: float) -> None:
        """Close the resident adapter that will be empty first, unless one is emptying already."""
        if any(self.placement.users(ref) for ref in self._closed.values()):
            return
        candidates = [
            ref
            for ref in self.placement.resident()
            if ref.revision not in self._claimed
            and self.placement.users(ref)
            and now - self._placed_at[ref.revision] >= self._patience_s
        ]
        if candidates:
            chosen = min(candidates, key=self._work_left)
            self._closed[chosen.revision] = chosen

    def _work_left(self, ref: AdapterRef) -> tuple[int, int]:
        """Users, then the tokens that the longest of them may still need: they run side by side."""
        users = self._users(ref.revision)
        return len(users), max(_tokens_left(sequence) for sequence in users)

    def _users(self, revision: Revision) -> list[Sequence]:
        """Sequences inside that use it, alone or beside others."""
        return [s for s in self._inside.values() if any(ref.revision == revision for ref in _refs(s))]

    def _end_claim(self) -> None:
        self._claimer = None
        self._claimed = frozenset()
        self._closed.clear()


class DeviceOrders:
    """Evictions and writes on their way to the device.

    A step that fails leaves its orders in doubt. Its evictions are simply repeated. A run whose write is in
    doubt is written again from the host copy, but only in a step that uses it: an adapter whose write always
    fails must not fail the steps of others.
    """

    def __init__(self) -> None:
        self._evictions: dict[Revision, AdapterRef] = {}
        self._writes: list[
            AdapterWrite
        ] = []  # in the order of the placements: a run may move twice in one step
        self._in_doubt: dict[Revision, AdapterWrite] = {}  # where the run belongs

    @property
    def in_doubt(self) -> set[Revision]:
        return set(self._in_doubt)

    def add(self, placed: Placed) -> None:
        for ref in placed.evicted:
            self._evictions[ref.revision] = ref
            self._in_doubt.pop(ref.revision, None)
            self._writes = [write for write in self._writes if write.ref.revision != ref.revision]
        for write in placed.writes:
            if write.ref.revision in self._in_doubt:
                self._in_doubt[write.ref.revision] = replace(write, moved_from=None)
            else:
                self._writes.append(write)

    def for_revisions(self, used: set[Revision]) -> tuple[tuple[AdapterRef, ...], tuple[AdapterWrite, ...]]:
        """Writes in doubt come last: by then every other run is where it belongs, so none is overwritten."""
        again = [write for revision, write in self._in_doubt.items() if revision in used]
        return tuple(self._evictions.values()), (*self._writes, *again)

    def confirm(self, writes: Iterable[AdapterWrite]) -> None:
        """The device has carried out what it was given."""
        for write in writes:
            self._in_doubt.pop(write.ref.revision, None)
        self._evictions.clear()
        self._writes.clear()

    def doubt(self) -> None:
        """The device failed somewhere on the way."""
        self._in_doubt |= {write.ref.revision: replace(write, moved_from=None) for write in self._writes}
        self._writes.clear()


def _refs(sequence: Sequence) -> tuple[AdapterRef, ...]:
    return () if sequence.adapter is None else sequence.adapter.refs


def _tokens_left(sequence: Sequence) -> int:
    """Upper bound of the tokens it will still take, computed ones and generated ones."""
    to_generate = sequence.stop.max_tokens - sequence.num_generated
    return sequence.num_tokens - sequence.num_computed + to_generate
