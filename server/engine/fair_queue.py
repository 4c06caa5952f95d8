"""Who waits, and whose turn it is: fair shares by counting tokens.

Each tenant has a counter of the service it got: every token that was computed for it, priced and divided by
its weight. The next turn is always that of the tenant with the least counter, and in it that of its oldest
sequence. So tenants that all have work get equal service, however much each of them asks for; what one does
not take, the others get; and with a single tenant the order is that of arrival.

    tenant   served                   waiting lines
    ant      |=========|              [a3] [a5] [a9]           <- next: a3
    bee      |============|           [b1]  and, with another adapter, [b2] [b4]
    cat      |====|                   (none: idle)
                  '-----> lifted to ant's when it waits again: being idle earns no credit

* What is charged is what is computed, when it is planned: not what the prefix cache had. Who computes again
  after a preemption is not charged twice, because the server chose whom to throw out. Who lost its blocks
  while its own reader did not read, is.
* Sequences of one tenant that wait with the same adapters form a line. Whatever keeps its head waiting keeps
  the others in it, so nothing here costs time by the sequence but joining and leaving.
* A tenant without sequences is remembered while it is ahead of those who wait, so that leaving and coming
  back pays no debt; then it is forgotten.

The method is the virtual token counter of "Fairness in Serving Large Language Models" (arXiv:2401.00588). Of
two tenants that both have something waiting, neither gets more than 2 * max(prefill price * longest prompt,
decode price * tokens in the batch) ahead of the other, over any stretch of time.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace, nsmallest

from adapters.types import AdapterRef, AdapterUse
from server.engine.sequence import Sequence, SequenceId, WaitReason

_MAX_REMEMBERED = 4096  # idle tenants; of more, those that are furthest ahead
_FEW = 64  # tenants that are not worth a look for forgotten ones


@dataclass(frozen=True, slots=True)
class Prices:
    """What a token costs. Both above 0, or somebody's turn would never end."""

    prefill: float = 1.0  # a token that is there already: of a prompt
    decode: float = 2.0  # a token that is drawn


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's."""

    served: float = 0.0  # the counter
    num_living: int = 0  # sequences
    num_lines: int = 0


@dataclass(slots=True, eq=False)
class Line:
    """Sequences of one tenant that wait with the same adapters, oldest first; not empty."""

    account: Account
    adapter: AdapterUse | None
    sequences: list[Sequence] = field(default_factory=list)
    reason: WaitReason | None = WaitReason.CAPACITY  # why they wait; None: not looked at yet in this step


LineKey = tuple[str, AdapterUse | None]
_Entry = tuple[float, bool, float, SequenceId, Account, Sequence | Line]
"""Counter, whether it waits (who runs goes first), arrival; whose counter it is, and who that is about."""


class FairQueue:
    """Belongs to the scheduler. Holds the sequences that wait and could run; knows the tenants of all."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices
        self._accounts: dict[str, Account] = {}
        self._lines: dict[LineKey, Line] = {}
        self._num_waiting = 0
        self._num_present = 0  # tenants with sequences
        self._last = Account()  # of the tenant that was the last to leave when nobody was left
        self._forget_at = _FEW

    # -- tenants ---------------------------------------------------------------------------------------

    def open(self, sequence: Sequence) -> None:
        """A sequence was born, wherever it goes."""
        account = self._accounts.setdefault(sequence.tenant, Account())
        self._num_present += not account.num_living
        account.num_living += 1

    def close(self, sequence: Sequence) -> None:
        """It is over; it waits no longer."""
        account = self._accounts[sequence.tenant]
        account.num_living -= 1
        self._num_present -= not account.num_living
        if len(self._accounts) > self._forget_at:
            self._forget()

    @property
    def num_present(self) -> int:
        """Tenants that have sequences, whatever these do."""
        return self._num_present

    def served(self, sequence: Sequence) -> float:
        """The counter of its tenant."""
        return self._accounts[sequence.tenant].served

    def charge(self, sequence: Sequence, start: int, num_tokens: int) -> None:
        """Positions [start, start + num_tokens) of it are computed in this step."""
        stop, cost = start + num_tokens, 0.0
        if stop > sequence.num_charged:
            cost = self._prices.prefill * (stop - max(start, sequence.num_charged))
            sequence.num_charged = stop
        if stop == len(sequence.tokens) and not sequence.is_prompt_only:
            cost += self._prices.decode  # now, for the token that is drawn; it is not charged when computed
            sequence.num_charged = stop + 1
        self._accounts[sequence.tenant].served += cost / sequence.weight

    # -- waiting ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Everybody who waits, line by line."""
        return (sequence for line in self._lines.values() for sequence in line.sequences)

    def add(self, sequence: Sequence) -> None:
        """It waits from now on, at its place by arrival."""
        key = (sequence.tenant, sequence.adapter)
        line = self._lines.get(key)
        if line is None:
            account = self._accounts[sequence.tenant]
            if not account.num_lines:
                account.served = max(account.served, self._level())
            line = self._lines[key] = Line(account, sequence.adapter)
            account.num_lines += 1
        insort(line.sequences, sequence, key=arrival_of)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        key = (sequence.tenant, sequence.adapter)
        line = self._lines[key]
        remove_from(line.sequences, sequence)
        self._num_waiting -= 1
        if not line.sequences:
            del self._lines[key]
            line.account.num_lines -= 1
            if not self._lines:
                self._last = line.account

    def reason_of(self, sequence: Sequence) -> WaitReason:
        """Why a sequence waits, as of the last step."""
        reason = self._lines[sequence.tenant, sequence.adapter].reason
        assert reason is not None, "not asked between steps"
        return reason

    def counts(self) -> tuple[tuple[WaitReason, int], ...]:
        """How many wait for what."""
        counts: Counter[WaitReason] = Counter()
        for line in self._lines.values():
            assert line.reason is not None
            counts[line.reason] += len(line.sequences)
        return tuple(counts.items())

    def adapters(self) -> tuple[tuple[AdapterRef, int], ...]:
        """How many wait with each adapter."""
        counts: Counter[AdapterRef] = Counter()
        for line in self._lines.values():
            for part in () if line.adapter is None else line.adapter.parts:
                counts[part.ref] += len(line.sequences)
        return tuple(counts.items())

    # -- turns -----------------------------------------------------------------------------------------

    def turns(self, running: Iterable[Sequence], *, may_enter: bool) -> Iterator[Sequence]:
        """Whose turn it is, one after the other, least served first: those of `running`, each once; and if
        `may_enter`, the heads of lines.

        Between two turns the caller may charge anybody, and may remove the sequence whose turn it was. A head
        that is still there after its turn stays there in this step, and the rest of its line with it.
        """
        heap: list[_Entry] = [
            (account.served, False, sequence.arrival, sequence.id, account, sequence)
            for sequence in running
            for account in (self._accounts[sequence.tenant],)
        ]
        if may_enter:
            heap.extend(_entry_of(line) for line in self._lines.values())
        heapify(heap)
        while heap:
            served, is_waiting, arrival, number, account, who = heap[0]
            if served != account.served:  # charged since it came into the heap
                heapreplace(heap, (account.served, is_waiting, arrival, number, account, who))
            elif isinstance(who, Sequence):
                heappop(heap)
                yield who
            else:
                head = who.sequences[0]
                yield head
                if who.sequences and who.sequences[0] is not head:
                    heapreplace(heap, _entry_of(who))
                else:
                    heappop(heap)

    def heads(self, num: int) -> list[Sequence]:
        """The first of the first lines: who will have the next turns."""
        return [line.sequences[0] for line in nsmallest(num, self._lines.values(), key=_entry_of)]

    def begin_turns(self) -> None:
        for line in self._lines.values():
            line.reason = None

    def skip(self, sequence: Sequence, reason: WaitReason) -> None:
        """Its line waits for something of its own; others pass it."""
        self._lines[sequence.tenant, sequence.adapter].reason = reason

    def end_turns(self, roadblock: WaitReason) -> None:
        """All that had no turn wait for the same as the one that held them up."""
        for line in self._lines.values():
            if line.reason is None:
                line.reason = roadblock

    # -- checks and small things -----------------------------------------------------------------------

    def check(self, living: Iterable[Sequence]) -> None:
        """Recompute what is kept incrementally; raises AssertionError."""
        num_living = Counter(sequence.tenant for sequence in living)
        assert self._num_present == len(num_living), "present"
        num_lines = Counter(tenant for tenant, _ in self._lines)
        assert set(num_living) <= set(self._accounts), "a tenant without account"
        for tenant, account in self._accounts.items():
            assert account.num_living == num_living[tenant], "living"
            assert account.num_lines == num_lines[tenant], "lines"
        for (tenant, adapter), line in self._lines.items():
            assert line.sequences, "an empty line"
            assert line.account is self._accounts[tenant], "another tenant's account"
            assert line.sequences == sorted(line.sequences, key=arrival_of), "order of arrival"
            assert all((one.tenant, one.adapter) == (tenant, adapter) for one in line.sequences), "line"
        assert self._num_waiting == sum(len(line.sequences) for line in self._lines.values()), "waiting"

    def _level(self) -> float:
        """Below this nobody begins to wait. It never falls."""
        if not self._lines:
            return self._last.served
        return min(line.account.served for line in self._lines.values())

    def _forget(self) -> None:
        """Idle tenants that the level has reached, for they would be lifted to it anyway; and of the others
        those that are the least ahead, if they are too many: it spares each a debt that is bounded.
        """
        level = self._level()
        idle = [
            (tenant, account)
            for tenant, account in self._accounts.items()
            if not account.num_living and account.served > level
        ]
        idle.sort(key=lambda each: -each[1].served)
        living = {tenant: account for tenant, account in self._accounts.items() if account.num_living}
        self._accounts = living | dict(idle[:_MAX_REMEMBERED])
        self._forget_at = 2 * len(self._accounts) + _FEW


def arrival_of(sequence: Sequence) -> tuple[float, SequenceId]:
    """Order of arrival; ids settle ties, because a step takes in many at the same clock reading."""
    return sequence.arrival, sequence.id


def remove_from(sequences: list[Sequence], sequence: Sequence) -> None:
    """From a list in order of arrival."""
    index = bisect_left(sequences, arrival_of(sequence), key=arrival_of)
    assert sequences[index] is sequence
    del sequences[index]


def _entry_of(line: Line) -> _Entry:
    head = line.sequences[0]
    return line.account.served, True, head.arrival, head.id, line.account, line
