"""Decides what each step computes. The idea in one paragraph:

A sequence has `num_computed <= num_tokens`; a step gives it a chunk of min(budget, num_tokens -
num_computed). First come the running sequences that only need their newest token. What is left of the budget
goes in turns, as `fair_queue.py` has them, to unfinished prompts of those who run and to those who wait: the
tenant that was served least comes first, and of its sequences the oldest. They get in without taking anything
from running ones. If blocks are short for a running sequence, those that do not run lose theirs first, then
the last in the same order goes back to waiting: the youngest of the tenant that was served most.

    WAITING ── start ──> RUNNING ── finish ──> FINISHED       `_running` is in order of arrival; who waits
       ^                    │                                 is in `_queue`, or in `_paused` while its
       └─ preempt, pause ───┘                                 client does not read; `_sequences` finds all

Admission asks, in this order, for a seat in the batch and budget (CAPACITY), for the adapter (ADAPTER) and
for blocks to hold all tokens (BLOCKS). Who lacks only the adapter is passed by others; who lacks blocks holds
up those whose turn comes later, or else small sequences would starve large ones: its tenant's counter stands
still while the others' grow, so before long it is the first and stays it. The blocks of a whole prompt are
taken at admission, although it may be computed in several chunks: so running sequences grow by single tokens
only, and few of them are ever thrown out.

Where a step's time grows with its tokens, tenants in company keep their steps short (`company.py`): several
sequences of one tenant together get so many tokens at most, in rotation, and the prompt of a *guest*, whose
turn it is and who was served no more than all who run, is computed without the newest tokens of the others.
What the guest is charged for that lets the others go on, and between two guests they have a step in any case.

That sequences throw each other out for ever is impossible. As long as nobody computes anything for the first
time, nobody is charged, and the order stands; the first in it is never thrown out and gets the budget it
needs, until it does compute something new.
"""

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from adapters.placement import AdapterPlacement
from adapters.types import AdapterRef, Clock, Revision
from server.engine.adapter_gate import AdapterGate
from server.engine.blocks import BlockPool
from server.engine.company import Company
from server.engine.fair_queue import FairQueue, Prices, arrival_of, remove_from
from server.engine.plan import RunnerOutput, SecondsByPart, StepPlan, StepStats
from server.engine.sequence import Sequence, SequenceId, SequenceStatus, WaitReason
from server.engine.step_draft import StepDraft, stats_of

ROADBLOCKS = frozenset({WaitReason.CAPACITY, WaitReason.BLOCKS})
"""Whoever waits for one of these keeps everybody waiting whose turn comes later."""

_LOOK_AHEAD = 8  # lines whose adapters are fetched while they cannot enter


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int  # sequences that run at the same time
    max_num_batched_tokens: int  # tokens of one step
    adapter_stay_s: float = 2.0  # how long an adapter keeps its place at least while others want it
    prefetches: bool = False  # whether the device can copy adapters beside a step
    prices: Prices = field(default_factory=Prices)
    crowd_tokens: int | None = (
        None  # of a crowd in a step, at first; None: the device's steps are as long anyway
    )


@dataclass(frozen=True, slots=True)
class Refusal:
    """A sequence that the scheduler itself has ended, because it can never run or never run on."""

    sequence: Sequence
    message: str  # client-safe


class Scheduler:
    """Who runs, who waits, who holds what. Owned by the engine thread; never waits and never fails."""

    def __init__(
        self,
        blocks: BlockPool,
        placement: AdapterPlacement,
        adapter_bytes: Callable[[AdapterRef], int],
        limits: SchedulerLimits,
        clock: Clock,
    ) -> None:
        self._blocks = blocks
        self._queue = FairQueue(limits.prices)
        self._gate = AdapterGate(
            placement,
            adapter_bytes,
            self._queue.served,
            stay_s=limits.adapter_stay_s,
            prefetches=limits.prefetches,
            clock=clock,
        )
        self._limits = limits
        self._clock = clock
        self._sequences: dict[SequenceId, Sequence] = {}
        self._running: list[Sequence] = []
        self._paused: dict[SequenceId, Sequence] = {}
        self._resting: dict[SequenceId, Sequence] = {}  # they have blocks without running
        self._draft = StepDraft()
        self._num_steps = 0
        self._company = Company(limits.crowd_tokens, clock)
        self._refusals: list[Refusal] = []

    # -- sequences come and go -------------------------------------------------------------------------

    @property
    def has_runnable(self) -> bool:
        """Whether a step would do something: all who live may be paused."""
        return bool(self._running or self._queue or self._gate.has_errands)

    def get(self, sequence_id: SequenceId) -> Sequence | None:
        return self._sequences.get(sequence_id)

    def add(self, sequence: Sequence) -> None:
        assert sequence.id not in self._sequences, "an id is used once"
        self._sequences[sequence.id] = sequence
        self._queue.open(sequence)
        self._queue.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Let go of a living sequence in whatever state it is: the only way out."""
        if sequence.status is SequenceStatus.RUNNING:
            remove_from(self._running, sequence)
        elif self._paused.pop(sequence.id, None) is None:
            self._queue.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[sequence.id]
        self._queue.close(sequence)
        self._resting.pop(sequence.id, None)
        self._gate.leave(sequence)
        self._gate.give_up(sequence)
        self._blocks.free(sequence)

    def pause(self, sequence: Sequence) -> None:
        """No forward passes until `resume`. It keeps its blocks until they are needed; not its adapter."""
        if sequence.is_paused:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._stop_running(sequence)
            if sequence.block_table:
                self._resting[sequence.id] = sequence
        else:
            self._queue.remove(sequence)
            self._gate.give_up(sequence)
        sequence.is_paused = True
        self._paused[sequence.id] = sequence

    def resume(self, sequence: Sequence) -> None:
        if sequence.is_paused:
            sequence.is_paused = False
            del self._paused[sequence.id]
            self._queue.add(sequence)

    def pin(self, refs: Iterable[AdapterRef]) -> None:
        """These adapters, and no others, stay on the device once there was room for them."""
        self._gate.pin(refs)

    def forget(self, revision: Revision) -> None:
        """Let go of an adapter that nobody will use any more."""
        self._gate.forget(revision)

    def wait_reason(self, sequence: Sequence) -> WaitReason:
        """Why one waits, as of the last step."""
        return WaitReason.READER if sequence.is_paused else self._queue.reason_of(sequence)

    # -- a step ----------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Put the next step together. None: nobody can run now. See also `take_refusals`."""
        crowd_tokens = self._company.max_crowd_tokens(self._queue.num_present)
        may_be_guests = not self._draft.is_guests  # the others wait for one guest at a time
        self._draft = StepDraft(self._limits.max_num_batched_tokens, crowd_tokens)
        self._num_steps += 1
        has_errands = self._gate.has_errands
        self._gate.begin_step()
        self._share_out(may_be_guests)
        chunks = tuple(self._draft.chunks)
        orders = self._gate.orders_for(chunks)
        if not chunks and not (orders.brings_adapters or has_errands):
            return None
        return StepPlan(chunks, orders.evictions, orders.writes, orders.prefetches)

    def commit(self, plan: StepPlan, output: RunnerOutput) -> None:
        """The step was carried out: its KV is there, full blocks can be shared, new tokens are appended."""
        self._gate.confirm(plan, output.lost)
        for chunk in plan.chunks:
            chunk.sequence.num_computed += chunk.num_tokens
            if chunk.sequence.id in output.failed:
                self._blocks.retract(chunk.sequence)
            else:
                self._blocks.publish(chunk.sequence, chunk.start)
        for token in output.tokens:
            self._sequences[token.id].tokens.append(token.token_id)
        for scores in output.scores:
            self._sequences[scores.id].num_scored += len(scores.tokens)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """The step took so long."""
        self._company.observe(seconds, plan.num_tokens, is_guests=self._draft.is_guests)

    def fail(self) -> None:
        """The step was not carried out, or only in part. The caller finishes its sequences."""
        self._gate.doubt()

    def take_refusals(self) -> list[Refusal]:
        taken, self._refusals = self._refusals, []
        return taken

    def stats(self, plan: StepPlan | None, step_s: float, seconds: SecondsByPart = ()) -> StepStats:
        """What the last step did, and the levels that it left."""
        return stats_of(
            self._draft,
            () if plan is None else plan.chunks,
            self._running,
            self._queue,
            self._paused.values(),
            self._blocks,
            self._gate.placement.resident(),
            step_s,
            seconds,
        )

    def check(self) -> None:
        """Recompute what is kept incrementally. To be called between steps; raises AssertionError."""
        living = list(self._sequences.values())
        waiting = [*self._queue, *self._paused.values()]
        assert {s.id for s in living} == {s.id for s in self._running + waiting}, "places and ids"
        assert len(living) == len(self._running) + len(waiting), "in two places"
        for sequences, status in ((self._running, SequenceStatus.RUNNING), (waiting, SequenceStatus.WAITING)):
            assert all(sequence.status is status for sequence in sequences), "status"
        assert self._running == sorted(self._running, key=arrival_of), "order of arrival"
        assert all(sequence.is_paused is (sequence.id in self._paused) for sequence in living), "paused"
        assert self._resting == {s.id: s for s in waiting if s.block_table}, "resting"
        assert len(self._running) <= self._limits.max_num_seqs, "too many run"
        for sequence in living:
            assert sequence.num_computed < sequence.num_tokens, "nothing to compute"
            num_blocks = self._blocks.blocks_for(sequence.num_computed)
            assert num_blocks <= len(sequence.block_table), "KV without blocks"
        self._blocks.check(sequence.block_table for sequence in living)
        self._queue.check(living)
        self._gate.check(self._running)

    # -- who is together in a step ---------------------------------------------------------------------

    def _share_out(self, may_be_guests: bool) -> None:
        """Fill the draft."""
        order = self._running_in_order()
        guest = self._find_guest(order) if may_be_guests else None
        if guest is None:
            self._continue_running(order)
            self._take_turns()
            return
        self._continue_running(order, guest)
        num_chunks = len(self._draft.chunks)
        self._take_turns(guest)
        self._draft.is_guests = len(self._draft.chunks) > num_chunks
        if not self._draft.is_guests:  # the guest cannot come in: the others go on as ever
            self._continue_running([sequence for sequence in order if sequence.tenant != guest])
            self._take_turns()

    def _find_guest(self, order: Iterable[Sequence]) -> str | None:
        """A tenant whose prompt has the first turn, while only tenants served no less have tokens due."""
        if self._draft.crowd_tokens is None:
            return None
        may_enter = len(self._running) < self._limits.max_num_seqs
        prompts = [sequence for sequence in order if _num_missing(sequence) > 1]
        first = next(self._queue.turns(prompts, may_enter=may_enter), None)
        if first is None:
            return None
        served = self._queue.served(first)
        hosts = [one for one in order if _num_missing(one) == 1 and one.tenant != first.tenant]
        is_due = bool(hosts) and all(self._queue.served(host) >= served for host in hosts)
        return first.tenant if is_due else None

    # -- running sequences -----------------------------------------------------------------------------

    def _running_in_order(self) -> list[Sequence]:
        """The order of turns as the step begins; a sort that is stable leaves equals in order of arrival.

        Those that a bound has left out come before those of their tenant that were in the step before.
        """
        served = self._queue.served
        if self._draft.crowd_tokens is None:
            return sorted(self._running, key=served)
        return sorted(self._running, key=lambda sequence: (served(sequence), sequence.last_step))

    def _continue_running(self, order: list[Sequence], tenant: str | None = None) -> None:
        """Give those who run and lack only their newest token that one; `order` loses those that stop.
        `tenant`: its sequences alone; None: all.
        """
        place = 0
        while place < len(order):
            sequence = order[place]
            takes_part = tenant in (None, sequence.tenant)
            is_due = _num_missing(sequence) == 1 and takes_part and self._draft.room_for(sequence)
            if is_due and self._secure_blocks(sequence, order):
                self._plan(sequence, 1)
            place += 1

    def _secure_blocks(self, sequence: Sequence, order: list[Sequence]) -> bool:
        """Get a running sequence the blocks for all its tokens, from others if need be. False: it stopped.

        `order` loses those that stop, at its end: never somebody before the sequence itself, who may already
        be in the plan.
        """
        if self._blocks.holds_all(sequence):
            return True
        while self._blocks.shortage(sequence):
            if self._take_from_resting(sequence):
                continue
            last = order.pop()
            if last is not sequence:
                self._preempt(last)
                continue
            if len(self._running) > 1:
                self._preempt(sequence)
            else:
                self._refuse(sequence, "the text no longer fits into the server's KV memory")
            return False
        self._blocks.allocate(sequence)
        return True

    def _take_from_resting(self, taker: Sequence) -> bool:
        """Free the blocks of the youngest sequence that has some without running. False: none has.

        Such a sequence is paused, or was until a moment ago and is not back yet. It pays for what it computes
        again: its own reader has kept it from running.
        """
        others = (sequence for sequence in self._resting.values() if sequence is not taker)
        sequence = max(others, key=arrival_of, default=None)
        if sequence is None:
            return False
        self._blocks.free(sequence)
        sequence.num_charged = 0
        del self._resting[sequence.id]
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._blocks.free(sequence)
        self._queue.add(sequence)
        self._draft.preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        """The caller says where it goes."""
        remove_from(self._running, sequence)
        sequence.status = SequenceStatus.WAITING
        self._gate.leave(sequence)

    # -- turns -----------------------------------------------------------------------------------------

    def _take_turns(self, guest: str | None = None) -> None:
        """Share out what is left of the budget until it is spent or the road is blocked, and note for
        everybody else why they wait. `guest`: until another tenant's turn comes.
        """
        draft = self._draft
        prompts = [sequence for sequence in self._running if _num_missing(sequence) > 1]
        num_prompts = len(prompts)
        is_seated = len(self._running) == self._limits.max_num_seqs
        roadblock = WaitReason.CAPACITY if is_seated else None
        self._queue.begin_turns()
        for sequence in self._queue.turns(prompts, may_enter=not is_seated) if draft.tokens_left else ():
            if guest is not None and sequence.tenant != guest:
                break
            room = draft.room_for(sequence)
            if sequence.status is SequenceStatus.RUNNING:
                num_prompts -= 1
                if room:
                    self._plan(sequence, min(room, _num_missing(sequence)))
            elif not room:
                self._queue.skip(sequence, WaitReason.CAPACITY)  # of its tenant's; others pass
            elif roadblock is None:
                reason = self._admit(sequence)
                if reason in ROADBLOCKS:
                    roadblock = reason
                elif reason is not None:
                    self._queue.skip(sequence, reason)
            if not draft.tokens_left or (roadblock is not None and not num_prompts):
                break
        self._queue.end_turns(roadblock or WaitReason.CAPACITY)
        if self._limits.prefetches and draft.chunks:
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Adapters of those who have the next turns may come beside this step."""
        for sequence in self._queue.heads(_LOOK_AHEAD):
            if not self._gate.prefetch(sequence):
                break

    def _admit(self, sequence: Sequence) -> WaitReason | None:
        """None: it waits no longer, because it runs, or because it never can and was refused."""
        if len(self._running) == self._limits.max_num_seqs or self._draft.tokens_left == 0:
            return WaitReason.CAPACITY
        if not self._gate.is_open_to(sequence):
            return WaitReason.ADAPTER
        if message := self._why_never(sequence):
            self._refuse(sequence, message)
            return None
        is_matching = sequence.may_share_prefix and not sequence.block_table
        matched = self._blocks.match_prefix(sequence) if is_matching else []
        if not self._has_room(sequence, matched):
            return WaitReason.BLOCKS
        if not self._gate.enter(sequence, is_first=not self._draft.chunks):
            return WaitReason.ADAPTER
        self._start(sequence, matched)
        return None

    def _why_never(self, sequence: Sequence) -> str | None:
        if self._blocks.blocks_for(sequence.num_tokens) > self._blocks.num_blocks:
            return "the text does not fit into the server's KV memory"
        if not self._gate.fits(sequence):
            return "the adapter does not fit into the server's adapter memory"
        return None

    def _has_room(self, sequence: Sequence, matched: list[int]) -> bool:
        """Whether all its tokens can be held, with a spare block for each running sequence to grow into."""
        while self._blocks.shortage(sequence, matched, spare=len(self._running)):
            if not self._take_from_resting(sequence):
                return False
        return True

    def _start(self, sequence: Sequence, matched: list[int]) -> None:
        self._blocks.allocate(sequence, matched)
        if sequence.started is None:
            sequence.started = self._clock()
            sequence.num_cached = sequence.num_computed
            is_queried = self._blocks.is_caching and sequence.may_share_prefix
            self._draft.prefix_queries += sequence.num_prompt if is_queried else 0
            self._draft.prefix_hits += sequence.num_cached
        self._queue.remove(sequence)
        self._resting.pop(sequence.id, None)
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=arrival_of)
        self._plan(sequence, min(self._draft.room_for(sequence), _num_missing(sequence)))

    def _plan(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence computes so many tokens in this step, and its tenant is charged for them."""
        self._draft.add(sequence, num_tokens)
        self._queue.charge(sequence, sequence.num_computed, num_tokens)
        sequence.last_step = self._num_steps

    def _refuse(self, sequence: Sequence, message: str) -> None:
        self.finish(sequence)
        self._refusals.append(Refusal(sequence, message))


def _num_missing(sequence: Sequence) -> int:
    """Tokens that are there and not computed."""
    return sequence.num_tokens - sequence.num_computed
