"""Which adapters may be used in this step: room in the arena, and whose turn it is to have some.

The scheduler asks twice. `is_open_to` is cheap and comes before the search for blocks; `enter` may evict,
place and compact, and comes last, when nothing else can keep the sequence out. Whoever entered leaves again
when it stops running, for whatever reason.

Device memory is handed over by the counters that say whose turn it is (`fair_queue.py`). A sequence that only
its adapters keep waiting is skipped, so that others pass it. The first in a step for which there is no room
is the *claimer*:

    nobody behind it gets room    in this step; those whose adapters are resident pass it
    one adapter is *closed* ────> of those in use that had their minimal stay, the one whose users were served
                                  most, if they were served no less than the claimer. Nobody enters with it
                                  any more, but for tenants that were served less than the claimer.
    the closed one is empty ────> it can be evicted. If that is room enough, the claimer enters and all are
                                  open again. If not, the next one is closed too.

Nobody starves. A claimer that stays has the least counter of those that want room, in the end also of those
that come, for they begin at the level of those that wait. Who uses an adapter is served more by every step,
so in the end each resident can be closed; sequences are finite, so a closed one empties; and those behind the
claimer place nothing. The minimal stay bounds what thrash costs: under overload the arena changes hands in
slices of at least that length, instead of once per sequence.

*Pins* are adapters that must stay. They get room before anybody else as soon as there is some, are never
evicted, and hold half of the arena at most.

Where the device can copy beside a step (`prefetches`), an adapter that is placed while others run is
prefetched with their step, and its sequences enter with the next one.
"""

import logging
from collections.abc import Callable, Iterable

from adapters.placement import AdapterPlacement
from adapters.types import AdapterRef, Clock, Revision
from server.engine.device_orders import DeviceOrders, Orders
from server.engine.plan import ScheduledChunk, StepPlan
from server.engine.sequence import Sequence, SequenceId

logger = logging.getLogger(__name__)


class AdapterGate:
    """Owned by the scheduler."""

    def __init__(
        self,
        placement: AdapterPlacement,
        num_bytes: Callable[[AdapterRef], int],
        served: Callable[[Sequence], float],
        *,
        stay_s: float,
        prefetches: bool,
        clock: Clock,
    ) -> None:
        """`served`: the counter of a sequence's tenant."""
        self.placement = placement
        self._num_bytes = num_bytes
        self._served = served
        self._stay_s = stay_s
        self._prefetches = prefetches
        self._clock = clock
        self._inside: dict[SequenceId, Sequence] = {}  # sequences that use their adapter
        self._placed_at: dict[Revision, float] = {}
        self._claimer: Sequence | None = None
        self._closed: dict[Revision, AdapterRef] = {}  # on behalf of the claimer
        self._is_full = False  # somebody found no room in this step
        self._pins: dict[Revision, int] = {}  # to the bytes of each
        self._unplaced_pins: list[AdapterRef] = []
        self._has_forgotten = False  # since the last step
        self._kept: set[Revision] = set()  # not evicted in this step: pins, and what those in front wait for
        self._orders = DeviceOrders()

    # -- pins ------------------------------------------------------------------------------------------

    def pin(self, refs: Iterable[AdapterRef]) -> None:
        """These adapters stay, and no others; the first of them, as far as they may hold the arena."""
        self._pins.clear()
        self._unplaced_pins.clear()
        for ref in refs:
            size = self._size_of_pin(ref)
            if size is None:
                continue
            if not self.placement.fit(2 * [*self._pins.values(), size]):
                logger.warning("adapter %s is not pinned on the device: pins hold half of it", ref.name)
                continue
            self._pins[ref.revision] = size
            self._closed.pop(ref.revision, None)
            if not self.placement.is_resident(ref):
                self._unplaced_pins.append(ref)

    def forget(self, revision: Revision) -> None:
        """Nobody will use this adapter any more: its room is free with the next step. In use it stays."""
        self._pins.pop(revision, None)
        self._unplaced_pins = [ref for ref in self._unplaced_pins if ref.revision != revision]
        ref = next((ref for ref in self.placement.resident() if ref.revision == revision), None)
        if ref is not None and not self.placement.users(ref):
            self._orders.add(self.placement.remove(ref))
            del self._placed_at[revision]
            self._closed.pop(revision, None)
            self._has_forgotten = True

    @property
    def has_errands(self) -> bool:
        """Whether a step without sequences would do something: then nothing else is in use."""
        return self._has_forgotten or not all(map(self.placement.is_resident, self._unplaced_pins))

    # -- a step ----------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        self._is_full = False
        self._has_forgotten = False
        self._kept = set(self._pins)
        for ref in tuple(self._unplaced_pins):
            if self._size_of_pin(ref) is None:
                del self._pins[ref.revision]
                self._unplaced_pins.remove(ref)
            elif self._make_resident((ref,)):
                self._unplaced_pins.remove(ref)

    def fits(self, sequence: Sequence) -> bool:
        """Whether its adapters fit into the arena at all, all at once and beside the pins."""
        sizes = {ref.revision: self._num_bytes(ref) for ref in _refs(sequence)}
        return not sizes or self.placement.fit((self._pins | sizes).values())

    def is_open_to(self, sequence: Sequence) -> bool:
        """Whether its adapters are there, or might be placed if the sequence could start now."""
        for ref in _refs(sequence):
            if ref.revision in self._closed:
                assert self._claimer is not None
                if self._served(sequence) >= self._served(self._claimer):
                    return False
            elif self._is_full and not self.placement.is_resident(ref):
                return False
        return True

    def enter(self, sequence: Sequence, *, is_first: bool) -> bool:
        """Make its adapters resident and hold them there. False: there is no room, or it enters with the next
        step. `is_first`: nothing else runs in this one, so there is nothing to copy beside.
        """
        refs = _refs(sequence)
        if not refs:
            return True
        if not self._make_resident(refs):
            self._is_full = True
            self._claim(sequence, refs)
            return False
        if self._prefetches and not is_first and any(map(self._can_be_prefetched, refs)):
            self._keep(refs)
            return False
        for ref in refs:
            self.placement.acquire(ref)
        self._inside[sequence.id] = sequence
        self.give_up(sequence)
        return True

    def prefetch(self, sequence: Sequence) -> bool:
        """Make room for what a sequence needs that cannot enter yet, out of what is free or idle and what
        nobody in front of it waits for. False: that is all the room there is.
        """
        refs = _refs(sequence)
        if not refs or not self.fits(sequence):
            return True
        if self._is_full or not self._make_resident(refs):
            return False
        self._keep(refs)
        return True

    def leave(self, sequence: Sequence) -> None:
        """The sequence does not run any more."""
        if self._inside.pop(sequence.id, None) is not None:
            for ref in _refs(sequence):
                self.placement.release(ref)

    def give_up(self, sequence: Sequence) -> None:
        """The sequence does not wait any more, or is paused: what was claimed for it is given back."""
        if self._claimer is sequence:
            self._end_claim()

    # -- the device ------------------------------------------------------------------------------------

    def orders_for(self, chunks: Iterable[ScheduledChunk]) -> Orders:
        """What the plan of these chunks must carry."""
        used = {ref.revision for chunk in chunks for ref in _refs(chunk.sequence)}
        return self._orders.for_step(used)

    def confirm(self, plan: StepPlan, lost: Iterable[Revision]) -> None:
        """The device has done what the plan says, but for `lost` prefetches: their adapters are gone."""
        self._orders.confirm((*plan.writes, *plan.prefetches))
        for revision in lost:
            self.forget(revision)

    def doubt(self) -> None:
        """The step failed: nobody knows which of its orders were carried out."""
        self._orders.doubt()

    def check(self, running: Iterable[Sequence]) -> None:
        """Recompute the users of each adapter from the running sequences, and the state of the claim."""
        self.placement.check()
        assert set(self._inside) == {s.id for s in running if s.adapter is not None}, "inside"
        residents = {ref.revision: ref for ref in self.placement.resident()}
        users = self._users()
        for revision, ref in residents.items():
            assert len(users.get(revision, ())) == self.placement.users(ref), "users"
        assert set(self._placed_at) == set(residents), "placed_at"
        assert set(self._closed) <= set(residents), "closed but not resident"
        assert self._claimer is not None or not self._closed, "closed without claim"
        assert self._claimer is None or self._claimer.id not in self._inside, "the claimer is inside"
        assert self._closed.keys().isdisjoint(self._pins), "a pin is closed"
        assert all(ref.revision in self._pins for ref in self._unplaced_pins), "unplaced pins"
        unplaced = {ref.revision for ref in self._unplaced_pins if ref.revision not in residents}
        assert unplaced == self._pins.keys() - set(residents), "pins"
        self._orders.check(set(residents))

    # -- room ------------------------------------------------------------------------------------------

    def _size_of_pin(self, ref: AdapterRef) -> int | None:
        """None: its host copy is gone. It was unpinned a moment ago, and we are about to hear of it."""
        try:
            return self._num_bytes(ref)
        except KeyError:
            return None

    def _make_resident(self, refs: Iterable[AdapterRef]) -> bool:
        """All of them or, where there is no room for all, none."""
        missing = [ref for ref in refs if not self.placement.is_resident(ref)]
        if not missing:
            return True
        kept = self._kept | {ref.revision for ref in refs}
        sizes = [self._num_bytes(ref) for ref in missing]
        if not self.placement.has_room(sizes, kept):
            return False
        for ref, size in zip(missing, sizes, strict=True):
            placed = self.placement.place(ref, size, kept)
            assert placed is not None, "there was room"
            for evicted in placed.evicted:
                del self._placed_at[evicted.revision]
                self._closed.pop(evicted.revision, None)
            self._placed_at[ref.revision] = self._clock()
            self._orders.add(placed)
        if self._claimer is not None and all(map(self.placement.is_resident, _refs(self._claimer))):
            self._end_claim()
        return True

    def _can_be_prefetched(self, ref: AdapterRef) -> bool:
        return self._orders.is_missing(ref.revision) and not self._orders.is_in_doubt(ref.revision)

    def _keep(self, refs: Iterable[AdapterRef]) -> None:
        self._kept.update(ref.revision for ref in refs)

    def _claim(self, sequence: Sequence, refs: Iterable[AdapterRef]) -> None:
        """It is the first in this step that finds no room. Close an adapter, unless one empties already."""
        self._claimer = sequence
        own = {ref.revision for ref in refs}
        for revision in own:
            self._closed.pop(revision, None)
        if any(self.placement.users(ref) for ref in self._closed.values()):
            return
        latest = self._clock() - self._stay_s
        stayed = {
            ref.revision: ref
            for ref in self.placement.resident()
            if self._placed_at[ref.revision] <= latest
            and self.placement.users(ref)
            and ref.revision not in own
            and ref.revision not in self._pins
        }
        if not stayed:
            return
        users = self._users()
        standing = {revision: self._standing(users[revision]) for revision in stayed}
        chosen = max(stayed, key=standing.__getitem__)
        if standing[chosen][0] >= self._served(sequence):
            self._closed[chosen] = stayed[chosen]

    def _standing(self, users: list[Sequence]) -> tuple[float, int, int]:
        """The most is closed first: how much the least served of the users got; of equals, that which will be
        empty first. They run side by side, so that is up to the longest.
        """
        return min(map(self._served, users)), -len(users), -max(map(_tokens_left, users))

    def _users(self) -> dict[Revision, list[Sequence]]:
        """Sequences inside by what they use, alone or beside other adapters."""
        users: dict[Revision, list[Sequence]] = {}
        for sequence in self._inside.values():
            for ref in _refs(sequence):
                users.setdefault(ref.revision, []).append(sequence)
        return users

    def _end_claim(self) -> None:
        self._claimer = None
        self._closed.clear()


def _refs(sequence: Sequence) -> tuple[AdapterRef, ...]:
    return () if sequence.adapter is None else sequence.adapter.refs


def _tokens_left(sequence: Sequence) -> int:
    """Upper bound of the tokens it will still take, computed ones and generated ones."""
    to_generate = sequence.stop.max_tokens - sequence.num_generated
    return sequence.num_tokens - sequence.num_computed + to_generate
