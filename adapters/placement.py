"""Who lies where in the arena: the bookkeeping of the adapters' device memory, without the memory.

    offset 0                                                                    capacity
    | run of a | run of c |///free///| run of b |///////////free////////////////|
                          ^ a gap

Bytes are counted, not slots: an adapter is one contiguous run, aligned, of the size it has. `place` tries the
cheapest thing first: a gap; then gaps and evictions of idle adapters, the longest idle first, until enough
bytes are free; and if those lie scattered, it slides runs down until they make one gap. Adapters in use are
never evicted, but they may slide: orders are carried out between two steps. What is decided here comes out as
`Placed`, for the device to repeat in that order.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from adapters.types import AdapterRef, AdapterWrite, Placed, Revision

ALIGNMENT_BYTES = 64
"""Of each run's start and of each piece in it: a cache line, and enough for any vector load."""


@dataclass(slots=True)
class _Run:
    """One resident adapter."""

    ref: AdapterRef
    offset: int
    num_bytes: int  # as asked for
    size: int  # rounded up to the alignment
    users: int = 0
    used_at: int = 0  # counter value of the last acquire or release

    @property
    def end(self) -> int:
        return self.offset + self.size


class AdapterPlacement:
    """Owned by one thread. Adapters are known by their revision: two names of one revision share a run."""

    def __init__(self, capacity_bytes: int, alignment: int = ALIGNMENT_BYTES) -> None:
        self._alignment = alignment
        self.capacity_bytes = capacity_bytes // alignment * alignment
        self._runs: dict[Revision, _Run] = {}
        self._clock = 0  # orders uses; no time in it

    def is_resident(self, ref: AdapterRef) -> bool:
        return ref.revision in self._runs

    def fits(self, num_bytes: int) -> bool:
        """Whether an adapter of this size can ever be resident."""
        return self.fit((num_bytes,))

    def fit(self, sizes: Iterable[int]) -> bool:
        """Whether adapters of these sizes can ever be resident at the same time."""
        return sum(map(self._aligned, sizes)) <= self.capacity_bytes

    def resident(self) -> tuple[AdapterRef, ...]:
        """Oldest first."""
        return tuple(run.ref for run in self._runs.values())

    def users(self, ref: AdapterRef) -> int:
        """How many hold it. It must be resident."""
        return self._runs[ref.revision].users

    def place(self, ref: AdapterRef, num_bytes: int) -> Placed | None:
        """Make an adapter resident that is not. None: the adapters in use leave no room now."""
        assert ref.revision not in self._runs, "already resident"
        size = self._aligned(num_bytes)
        victims = self._victims_for(size)
        if victims is None:
            return None
        for victim in victims:
            del self._runs[victim.ref.revision]
        offset, moves = self._make_gap(size)
        self._clock += 1
        self._runs[ref.revision] = _Run(ref, offset, num_bytes, size, used_at=self._clock)
        write = AdapterWrite(ref, offset, num_bytes)
        return Placed(tuple(victim.ref for victim in victims), (*moves, write))

    def acquire(self, ref: AdapterRef) -> None:
        """One more user; the adapter must be resident and stays so until as many have released it."""
        run = self._runs[ref.revision]
        run.users += 1
        self._touch(run)

    def release(self, ref: AdapterRef) -> None:
        run = self._runs[ref.revision]
        assert run.users > 0, "released more often than acquired"
        run.users -= 1
        self._touch(run)

    def check(self) -> None:
        """Recheck every promise about runs; raises AssertionError."""
        end = 0
        for run in self._in_order():
            assert run.offset >= end, "runs overlap"
            assert run.offset % self._alignment == 0, "run not aligned"
            assert run.size == self._aligned(run.num_bytes), "size"
            assert run.users >= 0, "users"
            end = run.end
        assert end <= self.capacity_bytes, "run beyond the arena"

    def _victims_for(self, size: int) -> list[_Run] | None:
        """Idle runs whose eviction leaves `size` bytes free, in one gap or in several; None: not possible."""
        free = self.capacity_bytes - sum(run.size for run in self._runs.values())
        idle = sorted((run for run in self._runs.values() if not run.users), key=lambda run: run.used_at)
        victims: list[_Run] = []
        while free < size:
            if len(victims) == len(idle):
                return None
            victims.append(idle[len(victims)])
            free += victims[-1].size
        return victims

    def _make_gap(self, size: int) -> tuple[int, list[AdapterWrite]]:
        """Offset of a gap of `size` bytes, and the moves that make it. Enough bytes are free.

        Runs slide down in order of offset, so each lands on bytes that are free or its own by then.
        """
        gap = self._smallest_gap(size)
        if gap is not None:
            return gap, []
        moves: list[AdapterWrite] = []
        cursor = 0
        for run in self._in_order():
            if run.offset - cursor >= size:
                break
            if run.offset != cursor:
                moves.append(AdapterWrite(run.ref, cursor, run.num_bytes, moved_from=run.offset))
                run.offset = cursor
            cursor = run.end
        return cursor, moves

    def _smallest_gap(self, size: int) -> int | None:
        """Offset of the best fit."""
        ends = [0, *(run.end for run in self._in_order())]
        starts = [*(run.offset for run in self._in_order()), self.capacity_bytes]
        gaps = [(start - end, end) for end, start in zip(ends, starts, strict=True) if start - end >= size]
        return min(gaps)[1] if gaps else None

    def _in_order(self) -> Iterable[_Run]:
        return sorted(self._runs.values(), key=lambda run: run.offset)

    def _aligned(self, num_bytes: int) -> int:
        return -(-num_bytes // self._alignment) * self._alignment

    def _touch(self, run: _Run) -> None:
        self._clock += 1
        run.used_at = self._clock
