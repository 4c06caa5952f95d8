"""What a step is told to do and what it answers: the records between service, core and runner.

Three directions. Service to core: `Command`s. Core to runner: a `StepPlan`; runner to core: a `RunnerOutput`.
Core to service: a `StepOutput`. Commands and StepOutputs cross threads and hold no shared objects; a StepPlan
stays on the engine thread and may point at its sequences.
"""

from dataclasses import dataclass
from typing import Protocol

from adapters.types import AdapterRef, AdapterWrite
from server.engine.sequence import Sequence, SequenceId, WaitReason
from server.types import Alternative, FinishReason, SamplingParams, StopCriteria


@dataclass(frozen=True, slots=True)
class Add:
    """Take in one choice."""

    id: SequenceId
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopCriteria
    seed: int
    adapter: AdapterRef | None


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


Command = Add | End | Pause | Resume


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """One sequence's share of a step: positions [start, start + num_tokens)."""

    sequence: Sequence
    start: int
    num_tokens: int  # >= 1

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that a new one can be drawn."""
        return self.start + self.num_tokens == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one forward pass needs. Evictions come before writes, writes before the forward."""

    chunks: tuple[ScheduledChunk, ...]  # not empty
    evictions: tuple[AdapterRef, ...] = ()
    writes: tuple[AdapterWrite, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the runner drew for one sequence whose chunk reached its last token."""

    id: SequenceId
    token_id: int
    logprob: float | None = None  # of the model's own distribution, before any SamplingParams
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    """One SampledToken per sampling chunk, or its id in `failed` when its logits were not finite."""

    tokens: tuple[SampledToken, ...]
    failed: tuple[SequenceId, ...] = ()


class Runner(Protocol):
    """The device side: the only thing that does arithmetic."""

    def run(self, plan: StepPlan) -> RunnerOutput:
        """Carry out the plan. Any exception means: nothing of this step counts."""
        ...


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """News of one sequence: a token, its end, or both. Exactly one output per sequence has a `finish`."""

    id: SequenceId
    token: SampledToken | None
    finish: FinishReason | None
    stop_token: int | None  # the stop_token_id that ended it; None for end-of-sequence
    started: float  # clock seconds of its first admission; of its end if it never ran
    num_cached: int
    error: str | None = None  # client-safe, with ERROR


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


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step tells the service."""

    outputs: tuple[SequenceOutput, ...]
    stats: StepStats
    at: float  # clock seconds of the step's end
