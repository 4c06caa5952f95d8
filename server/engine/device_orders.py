"""Orders on their way to the device: which runs of the arena to evict, to move and to write, and when.

What `AdapterPlacement` decides is true at once on this side; the device learns of it with the next plan. In
between, a run that was placed is *missing*: it has its place, but its bytes are not there.

    placed ──> missing ──> written before the step that uses it, or prefetched with an earlier one ──> there
                  ^                                                                                   │
                  └───────────── in doubt: a step failed while it was written or moved ───────────────┘

Runs that are there move first, in the order of the placements, for each lands where another one was. Missing
runs are written after that, from the host copy, where they belong by then.

A step that fails leaves its orders in doubt. Its evictions are simply repeated. A run in doubt is written
again, but only in a step that uses it: an adapter whose write always fails must not fail the steps of others.
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass, replace

from adapters.types import AdapterRef, AdapterWrite, Placed, Revision


@dataclass(frozen=True, slots=True)
class Orders:
    """What a plan must carry."""

    evictions: tuple[AdapterRef, ...] = ()
    writes: tuple[AdapterWrite, ...] = ()
    prefetches: tuple[AdapterWrite, ...] = ()

    @property
    def brings_adapters(self) -> bool:
        """Whether they are worth a step without sequences. Evictions alone can wait for the next one."""
        return bool(self.writes or self.prefetches)


class DeviceOrders:
    """Owned by the gate."""

    def __init__(self) -> None:
        self._evictions: dict[Revision, AdapterRef] = {}
        self._moves: list[AdapterWrite] = []  # a run may move twice in one step
        self._missing: dict[Revision, AdapterWrite] = {}  # at the places where they belong
        self._in_doubt: set[Revision] = set()  # of them

    def is_missing(self, revision: Revision) -> bool:
        """Whether the run's bytes will be there only after the next plan."""
        return revision in self._missing

    def is_in_doubt(self, revision: Revision) -> bool:
        return revision in self._in_doubt

    def add(self, placed: Placed) -> None:
        """The answer of a placement."""
        for ref in placed.evicted:
            self._evictions[ref.revision] = ref
            self._missing.pop(ref.revision, None)
            self._in_doubt.discard(ref.revision)
            self._moves = [move for move in self._moves if move.ref.revision != ref.revision]
        for write in placed.writes:
            if write.moved_from is None or write.ref.revision in self._missing:
                self._missing[write.ref.revision] = replace(write, moved_from=None)
            else:
                self._moves.append(write)

    def for_step(self, used: Set[Revision]) -> Orders:
        """Those of a step that uses these adapters."""
        now, beside = list(self._moves), list[AdapterWrite]()
        for revision, write in self._missing.items():
            if revision in used:
                now.append(write)
            elif revision not in self._in_doubt:
                beside.append(write)
        return Orders(tuple(self._evictions.values()), tuple(now), tuple(beside))

    def confirm(self, carried_out: Iterable[AdapterWrite]) -> None:
        """The device has done what it was told."""
        for write in carried_out:
            self._missing.pop(write.ref.revision, None)
            self._in_doubt.discard(write.ref.revision)
        self._evictions.clear()
        self._moves.clear()

    def doubt(self) -> None:
        """The device failed somewhere on the way."""
        for move in self._moves:
            self._missing[move.ref.revision] = replace(move, moved_from=None)
        self._moves.clear()
        self._in_doubt |= set(self._missing)

    def check(self, resident: Set[Revision]) -> None:
        """Between steps. Raises AssertionError."""
        assert set(self._missing) <= resident, "missing but not resident"
        assert set(self._missing) == self._in_doubt, "not on the way to the device"
