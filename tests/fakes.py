"""Fakes whose answers can be worked out by hand, and a rig that runs a real EngineCore on them. No torch.

`FakeRunner` has a paged memory and an arena of bytes, as a device has. It puts each token where the plan
says, and the next token is computed from what it *reads back* through the block table and from the bytes of
the adapter's run:

    weight(i)  = sum of the bytes of the adapter's run, of several adapters times their scales; 0 for the
                 base, and at positions i before the adapter is active
    cell(i)    = token i + 1000 * weight(i)
    next token = (sum over i of (i + 1) * cell(i) + weight(last i)) mod VOCAB_SIZE

What is asked about a prompt is made of the same numbers:

    score of token i     = -(number after the tokens before it + token i), in hundredths
    vector, last token   = (number after all tokens, number of tokens)
    vector, mean         = (sum of all cells, number of tokens)    summed up chunk by chunk

where "number" is what would be the next token. Any mistake in paging, preemption, prefix sharing or adapter
placement therefore changes the text. `expected_tokens`, `expected_scores` and `expected_vector` are the same
arithmetic without pages. What a plan must never ask for raises `WrongPlan`, which nothing catches.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

from adapters.placement import AdapterPlacement
from adapters.types import AdapterRef, AdapterUse, AdapterWrite, Revision
from server.engine.blocks import BlockPool
from server.engine.core import EngineCore
from server.engine.fair_queue import Prices
from server.engine.plan import (
    Add,
    Command,
    End,
    Forget,
    Pause,
    Pins,
    PromptScores,
    PromptVector,
    Resume,
    RunnerOutput,
    SampledToken,
    ScheduledChunk,
    ScoredToken,
    SequenceOutput,
    StepOutput,
    StepPlan,
)
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import Sequence, SequenceId
from server.types import Alternative, FinishReason, Pooling, SamplingParams, StopCriteria

VOCAB_SIZE = 97
EOS = 0
NEUTRAL = SamplingParams()
PRICES = Prices()
POISON = 10**15  # more than any honest sum: plays the part of NaN, whoever reads it fails too

AdapterBytes = int | Mapping[str, int]
"""Size of every adapter, or of each by name."""


class WrongPlan(BaseException):
    """The scheduler asked for something impossible. Not an Exception: the core survives those."""


class FakeClock:
    """Stands still until it is told to advance."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def adapter(name: str, revision: str | None = None) -> AdapterRef:
    return AdapterRef(name, Revision(f"r-{name}" if revision is None else revision))


def used(who: AdapterRef | AdapterUse | None) -> AdapterUse | None:
    """A use, where a test names a single adapter."""
    return AdapterUse.of(who) if isinstance(who, AdapterRef) else who


def run_of(revision: Revision, num_bytes: int) -> bytes:
    """The content of an adapter's run: its revision, over and over."""
    return (revision.encode() * num_bytes)[:num_bytes]


def expected_tokens(
    prompt: Items[int],
    stop: StopCriteria,
    *,
    run: bytes = b"",
    weight: int | None = None,
    start: int = 0,
    eos_token_ids: Collection[int] = (EOS,),
    max_model_len: int = 10_000,
) -> list[int]:
    """What a lonely sequence generates: the oracle of FakeRunner. `weight`: instead of a run's own; `start`:
    the position, inside the prompt, from which on it counts.
    """
    weight = sum(run) if weight is None else weight
    tokens, generated = list(prompt), []
    total = sum((i + 1) * cell for i, cell in enumerate(_cells(prompt, weight, start)))
    while True:
        token = (total + weight) % VOCAB_SIZE
        tokens.append(token)
        generated.append(token)
        total += len(tokens) * (token + 1000 * weight)
        is_eos = token in eos_token_ids and not stop.ignore_eos
        if len(generated) >= stop.min_tokens and (is_eos or token in stop.stop_token_ids):
            return generated
        if len(generated) >= stop.max_tokens or len(tokens) >= max_model_len:
            return generated


def expected_scores(
    prompt: Items[int], num_alternatives: int, *, run: bytes = b"", weight: int | None = None, start: int = 0
) -> list[ScoredToken]:
    """What a lonely prompt's tokens score, from the second on: the oracle of FakeRunner."""
    weight = sum(run) if weight is None else weight
    return _scores(prompt, _cells(prompt, weight, start), _Weight(weight, start), num_alternatives)


def expected_vector(
    prompt: Items[int], pooling: Pooling, *, run: bytes = b"", weight: int | None = None, start: int = 0
) -> tuple[float, ...]:
    """What becomes of a lonely prompt: the oracle of FakeRunner."""
    weight = sum(run) if weight is None else weight
    cells = _cells(prompt, weight, start)
    number = sum(cells) if pooling is Pooling.MEAN else _number(cells, weight)
    return (float(number), float(len(cells)))


@dataclass(frozen=True, slots=True)
class _Weight:
    """What a sequence's adapters weigh, from a position on."""

    weight: int
    start: int

    def at(self, position: int) -> int:
        return self.weight if position >= self.start else 0


def _cells(tokens: Items[int], weight: int, start: int) -> list[int]:
    active = _Weight(weight, start)
    return [token + 1000 * active.at(position) for position, token in enumerate(tokens)]


def _number(cells: Items[int], weight: int) -> int:
    return (sum(map(int.__mul__, cells, itertools.count(1))) + weight) % VOCAB_SIZE


def _scores(
    tokens: Items[int], cells: Items[int], weight: _Weight, num_alternatives: int, start: int = 0
) -> list[ScoredToken]:
    """Of the tokens after positions `start` and up, as many as there are cells for."""
    found = []
    for position in range(start, min(len(tokens) - 1, len(cells))):
        number, token = _number(cells[: position + 1], weight.at(position)), tokens[position + 1]
        likely = tuple(Alternative((number + i) % VOCAB_SIZE, -0.5 - i) for i in range(num_alternatives))
        found.append(ScoredToken(token, -(number + token) / 100, likely))
    return found


class FakeRunner:
    """A device made of lists.

    `interrupt(point)` is called at "start", before each "write" and each "prefetch" of an adapter, and at the
    "end" when the memory is already changed; it may raise, which fails the step there, or block. A run that
    is prefetched is torn while the step computes, and there when it has ended, unless its host copy is among
    the `lost`. Rows in `bad_rows` get no token. `choose` replaces the arithmetic: it maps a sequence to its
    next token.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        arena_bytes: int = 0,
        interrupt: Callable[[str], None] | None = None,
        choose: Callable[[Sequence], int | None] | None = None,
    ) -> None:
        self.block_size = block_size
        self.memory: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.arena = bytearray(arena_bytes)
        self.runs: dict[Revision, tuple[int, int]] = {}  # offset, num_bytes
        self.interrupt = interrupt or (lambda point: None)
        self.choose = choose or self._next_token
        self.bad_rows: set[SequenceId] = set()
        self.log: list[dict[SequenceId, tuple[int, int]]] = []  # start and num_tokens of each step's chunks
        self.writes: list[AdapterWrite] = []  # that were carried out
        self.prefetches: list[AdapterWrite] = []  # that were begun
        self.lost: set[Revision] = set()  # those without a host copy

    def run(self, plan: StepPlan) -> RunnerOutput:
        self.interrupt("start")
        self.log.append({chunk.sequence.id: (chunk.start, chunk.num_tokens) for chunk in plan.chunks})
        found = [write for write in plan.prefetches if write.ref.revision not in self.lost]
        self._obey_orders(plan, found)
        self._check_blocks(plan)
        for chunk in plan.chunks:
            self._store(chunk)
        self.interrupt("end")
        answers = {chunk.sequence.id: self._sample(chunk.sequence) for chunk in plan.chunks if chunk.samples}
        scores = [self._score(chunk) for chunk in plan.chunks if chunk.scored]
        vectors = [vector for chunk in plan.chunks if (vector := self._pool(chunk)) is not None]
        for write in found:
            self._write(write)
        failed = {sequence_id for sequence_id, token in answers.items() if token is None}
        failed |= {found.id for found in scores if not found.tokens}
        failed |= {vector.id for vector in vectors if not vector.values}
        return RunnerOutput(
            tokens=tuple(t for t in answers.values() if t is not None and t.id not in failed),
            failed=tuple(failed),
            scores=tuple(found for found in scores if found.id not in failed),
            vectors=tuple(vector for vector in vectors if vector.id not in failed),
            lost=tuple(write.ref.revision for write in plan.prefetches if write.ref.revision in self.lost),
        )

    def weight(self, use: AdapterUse | None) -> int:
        """Sum of the bytes that are in the arena where the adapters' runs should be."""
        return 0 if use is None else sum(int(part.scale * self._sum_of(part.ref)) for part in use.parts)

    def _sum_of(self, ref: AdapterRef) -> int:
        if ref.revision not in self.runs:
            raise WrongPlan(f"{ref} is used but not resident")
        offset, num_bytes = self.runs[ref.revision]
        return sum(self.arena[offset : offset + num_bytes])

    def read(self, sequence: Sequence, num_cells: int | None = None) -> list[int]:
        """All cells of a sequence or its first ones, through its block table."""
        num_cells = sequence.num_tokens if num_cells is None else num_cells
        cells = itertools.chain.from_iterable(self.memory[block] for block in sequence.block_table)
        found = list(itertools.islice(cells, num_cells))
        if None in found or len(found) < num_cells:
            raise WrongPlan(f"sequence {sequence.id} reads KV that was never written")
        return found  # type: ignore[return-value]

    def _obey_orders(self, plan: StepPlan, prefetches: Iterable[AdapterWrite]) -> None:
        for ref in plan.evictions:
            self.runs.pop(ref.revision, None)
        for write in plan.writes:
            self.interrupt("write")
            self._write(write)
        for write in prefetches:
            self.interrupt("prefetch")
            self._begin_prefetch(write)

    def _begin_prefetch(self, write: AdapterWrite) -> None:
        """Whoever reads the run before it is there reads nonsense, and whoever names it is caught."""
        self.prefetches.append(write)
        end = write.offset + write.num_bytes
        if end > len(self.arena) or write.moved_from is not None or write.ref.revision in self.runs:
            raise WrongPlan(f"{write} cannot be prefetched")
        self.arena[write.offset : end] = bytes([255]) * write.num_bytes

    def _write(self, write: AdapterWrite) -> None:
        self.writes.append(write)
        end = write.offset + write.num_bytes
        if end > len(self.arena):
            raise WrongPlan(f"{write} is outside of the arena")
        if write.moved_from is None:
            assert write.ref.revision not in self.lost, "nothing to write"
            self.arena[write.offset : end] = run_of(write.ref.revision, write.num_bytes)
        elif self.runs.get(write.ref.revision) != (write.moved_from, write.num_bytes):
            raise WrongPlan(f"{write} moves a run that is not there")
        else:
            self.arena[write.offset : end] = self.arena[write.moved_from : write.moved_from + write.num_bytes]
        self.runs[write.ref.revision] = (write.offset, write.num_bytes)

    def _check_blocks(self, plan: StepPlan) -> None:
        """No block that is written in this step belongs to another sequence of the step."""
        holders = Counter(block for chunk in plan.chunks for block in chunk.sequence.block_table)
        shared = {block for block, count in holders.items() if count > 1}
        for chunk in plan.chunks:
            if chunk.num_tokens < 1 or chunk.start != chunk.sequence.num_computed:
                raise WrongPlan(f"chunk of {chunk.sequence.id} starts at {chunk.start}")
            first, last = (
                chunk.start // self.block_size,
                (chunk.start + chunk.num_tokens - 1) // self.block_size,
            )
            if not shared.isdisjoint(chunk.sequence.block_table[first : last + 1]):
                raise WrongPlan(f"sequence {chunk.sequence.id} writes into a shared block")

    def _store(self, chunk: ScheduledChunk) -> None:
        sequence = chunk.sequence
        active = _Weight(self.weight(sequence.adapter), sequence.adapter_start)
        poison = POISON if sequence.id in self.bad_rows else 0
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            block, offset = sequence.block_table[position // self.block_size], position % self.block_size
            self.memory[block][offset] = sequence.tokens[position] + 1000 * active.at(position) + poison

    def _next_token(self, sequence: Sequence) -> int | None:
        cells = self.read(sequence)
        return None if max(cells) >= POISON else _number(cells, self.weight(sequence.adapter))

    def _score(self, chunk: ScheduledChunk) -> PromptScores:
        """Nothing in it: the row is bad."""
        item, wanted = chunk.sequence, chunk.scored
        cells, count = self.read(item, wanted.stop), item.sampling.num_prompt_logprobs or 0
        prompt = item.tokens[: item.num_prompt]
        if self._is_bad(item, cells):
            return PromptScores(item.id, ())
        active = _Weight(self.weight(item.adapter), item.adapter_start)
        return PromptScores(item.id, tuple(_scores(prompt, cells, active, count, wanted.start)))

    def _pool(self, chunk: ScheduledChunk) -> PromptVector | None:
        """None: nothing to tell yet. Nothing in it: the row is bad."""
        item = chunk.sequence
        if item.pooling is None:
            return None
        cells = self.read(item, chunk.stop)
        if item.pooling is Pooling.MEAN:
            before = item.pooled if chunk.start else (0, 0)
            if not isinstance(before, tuple) or before[1] != chunk.start:
                raise WrongPlan(f"sequence {item.id} goes on at {chunk.start} with a sum of {before}")
            item.pooled = (before[0] + sum(cells[chunk.start :]), chunk.stop)
        if not chunk.is_last:
            return None
        if self._is_bad(item, cells):
            return PromptVector(item.id, ())
        number = _number(cells, self.weight(item.adapter))
        if item.pooling is Pooling.MEAN:
            assert isinstance(item.pooled, tuple)
            number = item.pooled[0]
        return PromptVector(item.id, (float(number), float(len(cells))))

    def _is_bad(self, item: Sequence, cells: Items[int]) -> bool:
        return item.id in self.bad_rows or max(cells) >= POISON

    def _sample(self, sequence: Sequence) -> SampledToken | None:
        token_id = self.choose(sequence)
        if token_id is None or sequence.id in self.bad_rows:
            return None
        num_logprobs = sequence.sampling.num_logprobs
        if num_logprobs is None:
            return SampledToken(sequence.id, token_id)
        likely = tuple(Alternative((token_id + i) % VOCAB_SIZE, -0.5 - i) for i in range(num_logprobs))
        return SampledToken(sequence.id, token_id, -0.5, likely)


@dataclass(slots=True)
class Rig:
    """A real core on fakes, with everything inside within reach of a test."""

    core: EngineCore
    scheduler: Scheduler
    blocks: BlockPool
    placement: AdapterPlacement
    runner: FakeRunner
    clock: FakeClock
    sizes: AdapterBytes
    max_model_len: int
    step_s: float = 0.01  # what a step takes, by the clock
    ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    added: dict[SequenceId, Add] = field(default_factory=dict)
    outputs: dict[SequenceId, list[SequenceOutput]] = field(default_factory=dict)
    last: StepOutput | None = None  # of the last step that had one

    def add(
        self,
        prompt: Items[int],
        *,
        adapter: AdapterRef | AdapterUse | None = None,
        adapter_start: int = 0,
        max_tokens: int = 8,
        min_tokens: int = 0,
        stop_token_ids: Items[int] = (),
        ignore_eos: bool = True,
        sampling: SamplingParams = NEUTRAL,
        pooling: Pooling | None = None,
        tenant: str = "",
        weight: float = 1.0,
    ) -> SequenceId:
        """Ends of sequence are ignored unless a test is about them, so that lengths are known."""
        stop = StopCriteria(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=tuple(stop_token_ids),
            ignore_eos=ignore_eos,
        )
        command = Add(
            SequenceId(next(self.ids)),
            tuple(prompt),
            sampling,
            stop,
            0,
            used(adapter),
            pooling,
            tenant=tenant,
            weight=weight,
            adapter_start=adapter_start,
        )
        self.handle(command)
        return command.id

    def end(self, sequence_id: SequenceId, reason: FinishReason = FinishReason.ABORT) -> None:
        self.handle(End(sequence_id, reason))

    def pause(self, sequence_id: SequenceId) -> None:
        self.handle(Pause(sequence_id))

    def resume(self, sequence_id: SequenceId) -> None:
        self.handle(Resume(sequence_id))

    def pin(self, *refs: AdapterRef) -> None:
        self.handle(Pins(refs))

    def forget(self, ref: AdapterRef) -> None:
        self.handle(Forget(ref.revision))

    def handle(self, command: Command) -> None:
        if isinstance(command, Add):
            self.added[command.id] = command
            self.outputs[command.id] = []
        self.core.handle(command)

    def step(self) -> StepOutput | None:
        """One step; everything is checked after it."""
        had_work = self.core.has_work
        output = self.core.step()
        self.clock.advance(self.step_s)
        self.scheduler.check()
        assert (output is not None) == had_work, "a step with work does something, without work nothing"
        if output is not None:
            self.last = output
            for news in output.outputs:
                assert self.finish(news.id) is None, "news after the end"
                self.outputs[news.id].append(news)
        return output

    def run(self, max_steps: int = 1000) -> None:
        """Until there is nothing to do."""
        for _ in range(max_steps):
            if self.step() is None:
                return
        raise AssertionError(f"still busy after {max_steps} steps")

    def sequence(self, sequence_id: SequenceId) -> Sequence:
        """A living one."""
        sequence = self.scheduler.get(sequence_id)
        assert sequence is not None, f"sequence {sequence_id} does not live"
        return sequence

    def tokens(self, sequence_id: SequenceId) -> list[int]:
        """What it has generated so far."""
        return [news.token.token_id for news in self.outputs[sequence_id] if news.token is not None]

    def scores(self, sequence_id: SequenceId) -> list[ScoredToken]:
        """What has been told of its prompt so far."""
        return [scored for news in self.outputs[sequence_id] for scored in news.scores]

    def vector(self, sequence_id: SequenceId) -> tuple[float, ...] | None:
        terminal = self.finish(sequence_id)
        return None if terminal is None else terminal.vector

    def finish(self, sequence_id: SequenceId) -> SequenceOutput | None:
        """Its terminal output, if there was one."""
        news = self.outputs[sequence_id]
        return news[-1] if news and news[-1].finish is not None else None

    def reason(self, sequence_id: SequenceId) -> FinishReason | None:
        terminal = self.finish(sequence_id)
        return None if terminal is None else terminal.finish

    def expected(self, sequence_id: SequenceId) -> list[int]:
        """What it generates if nobody ends it."""
        command = self.added[sequence_id]
        return expected_tokens(
            command.prompt_ids,
            command.stop,
            weight=self._weight_of(command),
            start=command.adapter_start,
            max_model_len=self.max_model_len,
        )

    def expected_scores(self, sequence_id: SequenceId) -> list[ScoredToken]:
        """What is told of its prompt if nobody ends it."""
        command = self.added[sequence_id]
        count = command.sampling.num_prompt_logprobs
        if count is None:
            return []
        weight, start = self._weight_of(command), command.adapter_start
        return expected_scores(command.prompt_ids, count, weight=weight, start=start)

    def expected_vector(self, sequence_id: SequenceId) -> tuple[float, ...] | None:
        command = self.added[sequence_id]
        if command.pooling is None:
            return None
        weight, start = self._weight_of(command), command.adapter_start
        return expected_vector(command.prompt_ids, command.pooling, weight=weight, start=start)

    def _weight_of(self, command: Add) -> int:
        parts = () if command.adapter is None else command.adapter.parts
        return sum(int(part.scale * sum(run_of(part.ref.revision, self.size(part.ref)))) for part in parts)

    def size(self, ref: AdapterRef) -> int:
        return _size(self.sizes, ref)

    def assert_all_free(self) -> None:
        """Nothing is held and nothing is left to do."""
        self.assert_nothing_held()
        assert not self.core.has_work

    def assert_nothing_held(self) -> None:
        assert self.blocks.num_free == self.blocks.num_blocks
        assert all(self.placement.users(ref) == 0 for ref in self.placement.resident())


def make_rig(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    enable_prefix_caching: bool = True,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    arena_bytes: int = 40,
    sizes: AdapterBytes = 10,
    adapter_stay_s: float = 2.0,
    prefetches: bool = False,
    prices: Prices = PRICES,
    max_model_len: int = 10_000,
    interrupt: Callable[[str], None] | None = None,
    choose: Callable[[Sequence], int] | None = None,
    eos_token_ids: Collection[int] = (EOS,),
    clock: Any = None,
    crowd_tokens: int | None = None,
) -> Rig:
    """A core on a FakeRunner. By default four adapters of ten bytes fit."""
    clock = clock or FakeClock()
    blocks = BlockPool(num_blocks, block_size, enable_prefix_caching)
    placement = AdapterPlacement(arena_bytes, alignment=1)
    limits = SchedulerLimits(
        max_num_seqs, max_num_batched_tokens, adapter_stay_s, prefetches, prices, crowd_tokens
    )
    scheduler = Scheduler(blocks, placement, lambda ref: _size(sizes, ref), limits, clock)
    runner = FakeRunner(
        num_blocks=num_blocks,
        block_size=block_size,
        arena_bytes=arena_bytes,
        interrupt=interrupt,
        choose=choose,
    )
    core = EngineCore(scheduler, runner, clock, frozenset(eos_token_ids), max_model_len)
    return Rig(core, scheduler, blocks, placement, runner, clock, sizes, max_model_len)


def make_core(**knobs: Any) -> EngineCore:
    """For tests of what is above the core. Knobs as of `make_rig`; `clock` may be a real one."""
    return make_rig(**({"num_blocks": 1024, "block_size": 16, "max_num_seqs": 256} | knobs)).core


def _size(sizes: AdapterBytes, ref: AdapterRef) -> int:
    return sizes if isinstance(sizes, int) else sizes[ref.name]
