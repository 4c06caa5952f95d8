"""What a step is told to do and what it answers: the records between service, core and runner.

Three directions. Service to core: `Command`s. Core to runner: a `StepPlan`; runner to core: a `RunnerOutput`.
Core to service: a `StepOutput`. Commands and StepOutputs cross threads and hold no shared objects; a StepPlan
stays on the engine thread and may point at its sequences. What is made for each token is a NamedTuple, as in
`server.types`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from adapters.types import AdapterRef, AdapterUse, AdapterWrite, Revision
from server.engine.sequence import Sequence, SequenceId, WaitReason
from server.types import Alternative, FinishReason, Pooling, SamplingParams, StopCriteria


@dataclass(frozen=True, slots=True)
class Add:
    """Take in one choice."""

    id: SequenceId
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopCriteria
    seed: int
    adapter: AdapterUse | None
    pooling: Pooling | None = None  # with max_tokens 0: the answer is a vector of the prompt
    tenant: str = ""  # who is charged for it where shares are fair
    weight: float = 1.0  # of the tenant's share
    adapter_start: int = 0  # the adapter is active from this position on


@dataclass(frozen=True, slots=True)
class End:
    """The service wants no more tokens of this sequence. Idempotent; unknown ids are ignored.

    `reason` is STOP after a stop string (found in text, which the engine does not see), ABORT when the
    client left.
    """

    id: SequenceId
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Pause:
    """The reader is far behind or gone: no forward passes, and its blocks are the first to be taken."""

    id: SequenceId


@dataclass(frozen=True, slots=True)
class Resume:
    id: SequenceId


@dataclass(frozen=True, slots=True)
class Pins:
    """The adapters that must stay on the device, all of them: those of before count no more. Their host
    copies stay as long; that is the sender's part.
    """

    refs: tuple[AdapterRef, ...]  # if they are too many, the first ones

    @classmethod
    def of(cls, refs: Iterable[AdapterRef]) -> "Pins":
        """In an order that does not change."""
        return cls(tuple(sorted(refs, key=lambda ref: (ref.name, ref.revision))))


@dataclass(frozen=True, slots=True)
class Forget:
    """Nobody will ask for this revision again: its room on the device is wanted for others."""

    revision: Revision


Command = Add | End | Pause | Resume | Pins | Forget


class ScheduledChunk(NamedTuple):
    """One sequence's share of a step: positions [start, start + num_tokens)."""

    sequence: Sequence
    start: int
    num_tokens: int  # >= 1

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """Whether the chunk reaches the sequence's last token."""
        return self.start + self.num_tokens == len(self.sequence.tokens)

    @property
    def samples(self) -> bool:
        """Whether a new token is to be drawn after the chunk."""
        return self.is_last and not self.sequence.is_prompt_only

    @property
    def ends_prompt_only(self) -> bool:
        """Whether the sequence is over with this chunk, which answers with a vector or with nothing more."""
        return self.sequence.is_prompt_only and self.is_last

    @property
    def scored(self) -> range:
        """The positions whose logits are wanted for the token after them, which the prompt holds already.

        Not those that a sequence computes again after a preemption: each score is told once.
        """
        item = self.sequence
        if not item.is_unscored:
            return range(0)
        return range(max(self.start, item.num_scored), min(self.stop, item.num_prompt - 1))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one forward pass needs. Evictions come before writes, writes before the forward.

    Prefetches are begun after the writes too, and where the device can, they go on beside the forward: no
    chunk uses these runs, but those of the next plan may use, move or evict them.
    """

    chunks: tuple[ScheduledChunk, ...]  # empty: only adapters are to be placed
    evictions: tuple[AdapterRef, ...] = ()
    writes: tuple[AdapterWrite, ...] = ()
    prefetches: tuple[AdapterWrite, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class SampledToken(NamedTuple):
    """What the runner drew for one sequence whose chunk reached its last token."""

    id: SequenceId
    token_id: int
    logprob: float | None = None  # of the model's own distribution, before any SamplingParams
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a prompt, and what the model thought of it before it came."""

    token_id: int
    logprob: float
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The tokens after the positions in a chunk's `scored`."""

    id: SequenceId
    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True, slots=True)
class PromptVector:
    """The pooled hidden states of a prompt, scaled to length 1."""

    id: SequenceId
    values: tuple[float, ...]


class Part(StrEnum):
    """What the time of a step goes into."""

    SCHEDULING = "scheduling"  # what runs, and what becomes of the answers
    INPUTS = "inputs"  # adapters into place, tokens into tensors
    LINEAR = "linear layers"
    ADAPTERS = "adapters"
    ATTENTION = "attention"
    ACTIVATIONS = "norms and activations"
    MODEL = "rest of the model"  # embedding and head; all of it, where its layers are not one call
    SAMPLING = "sampling"


SecondsByPart = tuple[tuple[Part, float], ...]


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    """One SampledToken per sampling chunk, PromptScores per chunk that has positions to score, one
    PromptVector per pooled sequence that is over; or the id in `failed` when what was computed was not
    finite.

    `lost`: prefetches that were left out since the host copy is gone. Only a pin that is just being taken
    back can be among them: whatever a sequence uses is held for it.
    """

    tokens: tuple[SampledToken, ...]
    failed: tuple[SequenceId, ...] = ()
    scores: tuple[PromptScores, ...] = ()
    vectors: tuple[PromptVector, ...] = ()
    lost: tuple[Revision, ...] = ()
    seconds: SecondsByPart = field(default=(), compare=False)


class Runner(Protocol):
    """The device side: the only thing that does arithmetic."""

    def run(self, plan: StepPlan) -> RunnerOutput:
        """Carry out the plan. Any exception means: nothing of this step counts."""
        ...


class SequenceOutput(NamedTuple):
    """News of one sequence: scores of its prompt, a token, its end, or several of these. Exactly one output
    per sequence has a `finish`.
    """

    id: SequenceId
    token: SampledToken | None
    finish: FinishReason | None
    stop_token: int | None  # the stop_token_id that ended it; None for end-of-sequence
    started: float  # clock seconds of its first admission; of its end if it never ran
    num_cached: int
    error: str | None = None  # client-safe, with ERROR
    scores: tuple[ScoredToken, ...] = ()  # the next tokens of its prompt, from the second one on
    vector: tuple[float, ...] | None = None  # with the finish of a sequence that was pooled


@dataclass(frozen=True, slots=True)
class StepStats:
    """A snapshot after one step, for metrics. Counts are of this step, levels are as of its end."""

    running: int
    waiting: int
    waiting_by: tuple[tuple[WaitReason, int], ...]
    prefill_tokens: int
    decode_tokens: int
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int  # of them found
    preemptions: int
    blocks_used: int
    blocks_total: int
    adapters_resident: tuple[AdapterRef, ...]
    adapters_running: tuple[AdapterRef, ...]
    adapters_waiting: tuple[AdapterRef, ...]
    step_s: float
    running_of: tuple[tuple[AdapterRef, int], ...] = ()  # sequences, of each of adapters_running
    waiting_of: tuple[tuple[AdapterRef, int], ...] = ()
    seconds: SecondsByPart = ()  # of step_s


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step tells the service."""

    outputs: tuple[SequenceOutput, ...]  # ends last: they are most work for the event loop
    stats: StepStats
    at: float  # clock seconds of the step's end
