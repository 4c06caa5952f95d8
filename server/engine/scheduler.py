"""Decides what each step computes. The idea in one paragraph:

A sequence has `num_computed <= num_tokens`; a step gives it a chunk of min(budget, num_tokens -
num_computed). First come the running sequences in order of arrival; those that only need their newest token
are sure of it before anybody's prompt gets more. If blocks are short, sequences that do not run lose theirs
first, then the youngest running one goes back to waiting. What is left of the budget goes to waiting
sequences in admission order; they get in without taking anything from running ones.

    WAITING ── start ──> RUNNING ── finish ──> FINISHED       `_waiting` and `_running` are in order of
       ^                    │                                 arrival, also after a preemption;
       └─ preempt, pause ───┘                                 `_sequences` finds both by id

Admission asks, in this order, for a seat in the batch and budget (CAPACITY), for the adapter (ADAPTER) and
for blocks to hold all tokens (BLOCKS). Who lacks only the adapter is passed by others; who lacks blocks holds
up those behind, or else small sequences would starve large ones. The blocks of a whole prompt are taken at
admission, although it may be computed in several chunks: so running sequences grow by single tokens only, and
few of them are ever thrown out.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from adapters.placement import AdapterPlacement
from adapters.types import AdapterRef, Clock
from server.engine.adapter_gate import AdapterGate
from server.engine.blocks import BlockPool
from server.engine.plan import RunnerOutput, ScheduledChunk, StepPlan, StepStats
from server.engine.sequence import Sequence, SequenceId, SequenceStatus, WaitReason

ROADBLOCKS = frozenset({WaitReason.CAPACITY, WaitReason.BLOCKS})
"""Whoever waits for one of these keeps everybody behind waiting too."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int  # sequences that run at the same time
    max_num_batched_tokens: int  # tokens of one step
    adapter_patience_s: float = 2.0  # how long a sequence lets others pass it for want of its adapter


@dataclass(frozen=True, slots=True)
class Refusal:
    """A sequence that the scheduler itself has ended, because it can never run or never run on."""

    sequence: Sequence
    message: str  # client-safe


@dataclass(slots=True)
class StepDraft:
    """A step while it is put together, and what is worth counting on the way."""

    tokens_left: int = 0  # of the step's budget
    prefill_left: int = 0  # of them not promised to running sequences that need one token
    chunks: list[ScheduledChunk] = field(default_factory=list)
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    def share(self, num_missing: int) -> int:
        """How many of its missing tokens a running sequence may compute now."""
        return min(num_missing, self.tokens_left if num_missing == 1 else self.prefill_left)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        self.chunks.append(ScheduledChunk(sequence, sequence.num_computed, num_tokens))
        self.tokens_left -= num_tokens
        if sequence.num_tokens - sequence.num_computed > 1:
            self.prefill_left -= num_tokens


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
        self._gate = AdapterGate(placement, adapter_bytes, limits.adapter_patience_s, clock)
        self._limits = limits
        self._clock = clock
        self._sequences: dict[SequenceId, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._draft = StepDraft()
        self._refusals: list[Refusal] = []

    # -- sequences come and go -------------------------------------------------------------------------

    @property
    def has_runnable(self) -> bool:
        """Whether a step would do something: all who live may be paused."""
        return bool(self._running) or any(not sequence.is_paused for sequence in self._waiting)

    def get(self, sequence_id: SequenceId) -> Sequence | None:
        return self._sequences.get(sequence_id)

    def add(self, sequence: Sequence) -> None:
        assert sequence.id not in self._sequences, "an id is used once"
        self._sequences[sequence.id] = sequence
        insort(self._waiting, sequence, key=_arrival)

    def finish(self, sequence: Sequence) -> None:
        """Let go of a living sequence in whatever state it is: the only way out."""
        _remove(self._running if sequence.status is SequenceStatus.RUNNING else self._waiting, sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[sequence.id]
        self._gate.leave(sequence)
        self._gate.give_up(sequence)
        self._blocks.free(sequence)

    def pause(self, sequence: Sequence) -> None:
        """No forward passes until `resume`. It keeps its blocks until they are needed; not its adapter."""
        if sequence.status is SequenceStatus.RUNNING:
            self._stop_running(sequence)
        self._gate.give_up(sequence)
        sequence.is_paused = True
        sequence.wait_reason = WaitReason.READER

    def resume(self, sequence: Sequence) -> None:
        sequence.is_paused = False
        sequence.wait_reason = WaitReason.CAPACITY

    # -- a step ----------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Put the next step together. None: nobody can run now. See also `take_refusals`."""
        self._draft = StepDraft(tokens_left=self._limits.max_num_batched_tokens)
        self._gate.begin_step()
        self._continue_running()
        self._admit_waiting()
        if not self._draft.chunks:
            return None
        evictions, writes = self._gate.orders_for(self._draft.chunks)
        return StepPlan(tuple(self._draft.chunks), evictions, writes)

    def commit(self, plan: StepPlan, output: RunnerOutput) -> None:
        """The step was carried out: its KV is there, full blocks can be shared, new tokens are appended."""
        self._gate.confirm(plan)
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

    def fail(self) -> None:
        """The step was not carried out, or only in part. The caller finishes its sequences."""
        self._gate.doubt()

    def take_refusals(self) -> list[Refusal]:
        taken, self._refusals = self._refusals, []
        return taken

    def stats(self, plan: StepPlan | None, step_s: float) -> StepStats:
        """What the last step did, and the levels that it left."""
        chunks = () if plan is None else plan.chunks
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        num_decodes = sum(
            chunk.num_tokens == 1 and chunk.start >= chunk.sequence.num_prompt for chunk in chunks
        )
        running_of, waiting_of = _counted(self._running), _counted(self._waiting)
        return StepStats(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_by=tuple(Counter(sequence.wait_reason for sequence in self._waiting).items()),
            prefill_tokens=num_tokens - num_decodes,
            decode_tokens=num_decodes,
            prefix_queries=self._draft.prefix_queries,
            prefix_hits=self._draft.prefix_hits,
            preemptions=self._draft.preemptions,
            blocks_used=self._blocks.num_blocks - self._blocks.num_free,
            blocks_total=self._blocks.num_blocks,
            adapters_resident=self._gate.placement.resident(),
            adapters_running=tuple(ref for ref, _ in running_of),
            adapters_waiting=tuple(ref for ref, _ in waiting_of),
            step_s=step_s,
            running_of=running_of,
            waiting_of=waiting_of,
        )

    def check(self) -> None:
        """Recompute what is kept incrementally. To be called between steps; raises AssertionError."""
        living = list(self._sequences.values())
        assert {s.id for s in living} == {s.id for s in self._running + self._waiting}, "lists and ids"
        assert len(living) == len(self._running) + len(self._waiting), "in both lists"
        for sequences, status in (
            (self._running, SequenceStatus.RUNNING),
            (self._waiting, SequenceStatus.WAITING),
        ):
            assert all(sequence.status is status for sequence in sequences), "status"
            assert sequences == sorted(sequences, key=_arrival), "order of arrival"
        assert len(self._running) <= self._limits.max_num_seqs, "too many run"
        for sequence in living:
            assert sequence.num_computed < sequence.num_tokens, "nothing to compute"
            num_blocks = self._blocks.blocks_for(sequence.num_computed)
            assert num_blocks <= len(sequence.block_table), "KV without blocks"
            if sequence.is_paused:
                assert sequence.wait_reason is WaitReason.READER, "paused for another reason"
                assert sequence.adapter_wait_since is None, "patience of one who cannot run"
        self._blocks.check(sequence.block_table for sequence in living)
        self._gate.check(self._running)

    # -- running sequences -----------------------------------------------------------------------------

    def _continue_running(self) -> None:
        draft = self._draft
        num_decodes = sum(sequence.num_tokens - sequence.num_computed == 1 for sequence in self._running)
        draft.prefill_left = max(0, draft.tokens_left - num_decodes)
        for sequence in tuple(self._running):
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted a moment ago, for one of those before it
            num_tokens = draft.share(sequence.num_tokens - sequence.num_computed)
            if num_tokens > 0 and self._secure_blocks(sequence):
                draft.add(sequence, num_tokens)

    def _secure_blocks(self, sequence: Sequence) -> bool:
        """Get a running sequence the blocks for all its tokens, from others if need be. False: it stopped."""
        if self._blocks.holds_all(sequence):
            return True
        while self._blocks.shortage(sequence):
            if self._take_from_waiting(sequence):
                continue
            youngest = self._running[-1]
            if youngest is not sequence:
                self._preempt(youngest)
            elif len(self._running) > 1:
                self._preempt(sequence)
                return False
            else:
                self._refuse(sequence, "the text no longer fits into the server's KV memory")
                return False
        self._blocks.allocate(sequence)
        return True

    def _take_from_waiting(self, taker: Sequence) -> bool:
        """Free the blocks of the youngest sequence that has some without running. False: none has.

        Such a sequence is paused, or was until a moment ago and is not back yet.
        """
        for sequence in reversed(self._waiting):
            if sequence.block_table and sequence is not taker:
                self._blocks.free(sequence)
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._blocks.free(sequence)
        sequence.wait_reason = WaitReason.BLOCKS
        self._draft.preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        _remove(self._running, sequence)
        sequence.status = SequenceStatus.WAITING
        insort(self._waiting, sequence, key=_arrival)
        self._gate.leave(sequence)

    # -- admission -------------------------------------------------------------------------------------

    def _admission_order(self) -> list[Sequence]:
        """Those who may be admitted, first come first served: the one place that says who is next."""
        return [sequence for sequence in self._waiting if not sequence.is_paused]

    def _admit_waiting(self) -> None:
        """Admit until the road is blocked, and note for everybody else why they wait."""
        roadblock: WaitReason | None = None
        for sequence in self._admission_order():
            reason = roadblock or self._admit(sequence)
            if reason is not None:
                sequence.wait_reason = reason
            if reason in ROADBLOCKS:
                roadblock = reason

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
        if not self._gate.enter(sequence):
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
            if not self._take_from_waiting(sequence):
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
        _remove(self._waiting, sequence)
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=_arrival)
        self._draft.add(sequence, min(self._draft.tokens_left, sequence.num_tokens - sequence.num_computed))

    def _refuse(self, sequence: Sequence, message: str) -> None:
        self.finish(sequence)
        self._refusals.append(Refusal(sequence, message))


def _arrival(sequence: Sequence) -> tuple[float, SequenceId]:
    """Order of arrival; ids settle ties, because a step takes in many at the same clock reading."""
    return sequence.arrival, sequence.id


def _remove(sequences: list[Sequence], sequence: Sequence) -> None:
    """From a list in order of arrival."""
    index = bisect_left(sequences, _arrival(sequence), key=_arrival)
    assert sequences[index] is sequence
    del sequences[index]


def _counted(sequences: Iterable[Sequence]) -> tuple[tuple[AdapterRef, int], ...]:
    """How many use each adapter, in order of first use."""
    uses = (sequence.adapter for sequence in sequences)
    return tuple(Counter(part.ref for use in uses if use is not None for part in use.parts).items())
