"""A step while it is put together, and what there is to tell of it when it is over."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from adapters.types import AdapterRef
from server.engine.blocks import BlockPool
from server.engine.fair_queue import FairQueue
from server.engine.plan import ScheduledChunk, SecondsByPart, StepStats
from server.engine.sequence import Sequence, WaitReason

_Counts = tuple[tuple[AdapterRef, int], ...]


@dataclass(slots=True)
class StepDraft:
    """The chunks so far, what is left of the budget, and what is worth counting on the way."""

    tokens_left: int = 0
    crowd_tokens: int | None = None  # several sequences of one tenant together may take so many; None: all
    is_guests: bool = False  # a prompt has the step to itself
    chunks: list[ScheduledChunk] = field(default_factory=list)
    taken: Counter[str] = field(default_factory=Counter)  # tokens by tenant
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    def room_for(self, sequence: Sequence) -> int:
        """How many tokens it may compute in this step."""
        taken = self.taken[sequence.tenant]
        if self.crowd_tokens is None or not taken:
            return self.tokens_left
        return max(0, min(self.tokens_left, self.crowd_tokens - taken))

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        self.chunks.append(ScheduledChunk(sequence, sequence.num_computed, num_tokens))
        self.tokens_left -= num_tokens
        self.taken[sequence.tenant] += num_tokens


def stats_of(
    draft: StepDraft,
    chunks: Collection[ScheduledChunk],
    running: Collection[Sequence],
    queue: FairQueue,
    paused: Collection[Sequence],
    blocks: BlockPool,
    resident: tuple[AdapterRef, ...],
    step_s: float,
    seconds: SecondsByPart,
) -> StepStats:
    """What the step of these chunks did, and the levels that it left."""
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    num_decodes = sum(chunk.num_tokens == 1 and chunk.start >= chunk.sequence.num_prompt for chunk in chunks)
    waiting_by = queue.counts()
    if paused:
        waiting_by = (*waiting_by, (WaitReason.READER, len(paused)))
    running_of = _counted(running)
    waiting_of = _added(queue.adapters(), _counted(paused))
    return StepStats(
        running=len(running),
        waiting=len(queue) + len(paused),
        waiting_by=waiting_by,
        prefill_tokens=num_tokens - num_decodes,
        decode_tokens=num_decodes,
        prefix_queries=draft.prefix_queries,
        prefix_hits=draft.prefix_hits,
        preemptions=draft.preemptions,
        blocks_used=blocks.num_blocks - blocks.num_free,
        blocks_total=blocks.num_blocks,
        adapters_resident=resident,
        adapters_running=tuple(ref for ref, _ in running_of),
        adapters_waiting=tuple(ref for ref, _ in waiting_of),
        step_s=step_s,
        seconds=seconds,
        running_of=running_of,
        waiting_of=waiting_of,
    )


def _counted(sequences: Iterable[Sequence]) -> _Counts:
    """How many use each adapter, in order of first use."""
    uses = (sequence.adapter for sequence in sequences)
    return tuple(Counter(part.ref for use in uses if use is not None for part in use.parts).items())


def _added(*counts: _Counts) -> _Counts:
    total: Counter[AdapterRef] = Counter()
    for some in counts:
        total.update(dict(some))
    return tuple(total.items())
