"""The records that protocols, service and engine exchange. Standard library only.

A protocol turns a body into a `GenerationRequest`; the engine answers with `TokenEvent`s, of which the last
one of each choice carries a `Finish`. Nothing here knows HTTP or torch, and everything is frozen, so that the
two threads (or one day two processes) share no state. What is made for each token is a NamedTuple: it is made
in a third of the time.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from adapters.types import AdapterRef, AdapterUse


class Pooling(StrEnum):
    """How the hidden states of a prompt become one vector."""

    MEAN = "mean"  # of all tokens
    LAST = "last"  # token's


class FinishReason(StrEnum):
    """Why a choice ended. Protocols translate it into their own words."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string; see Finish.stop
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"  # the client left, or the server drains
    ERROR = "error"  # see Finish.error


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. The neutral value of each field costs nothing.

    Order of application: logit_bias, penalties, min_tokens and bans, temperature, top_k, top_p, min_p,
    typical_p, draw.
    """

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0  # locally typical sampling, arXiv:2202.00666
    repetition_penalty: float = 1.0  # over prompt and output; CTRL, arXiv:1909.05858
    frequency_penalty: float = 0.0  # over output only
    presence_penalty: float = 0.0  # over output only
    penalty_window: int | None = None  # n >= 1: all three over the last n tokens of prompt and output instead
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # None: the service draws one
    num_logprobs: int | None = (
        None  # None: no logprobs; k: of the sampled token and of the k most likely ones
    )
    num_prompt_logprobs: int | None = None  # the same for the tokens of the prompt

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's own generation_config recommends; None where it is silent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class StopCriteria:
    """When a choice ends."""

    max_tokens: int  # 0: nothing is generated, the prompt is all that is asked about
    min_tokens: int = 0
    stop: tuple[str, ...] = ()  # matched anywhere in the text, also inside a token
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()  # an adapter's own, beside those of the model
    ignore_eos: bool = False
    keep_stop: bool = False  # LoRAX keeps the stop string in the text, OpenAI strips it


class QuotaKind(StrEnum):
    """What a hard limit is of."""

    ADAPTER = "adapter"
    KEY = "key"


@dataclass(frozen=True, slots=True)
class Quota:
    """A hard limit that a request counts against, with all others of the same subject."""

    kind: QuotaKind
    subject: str  # tells one from another: the adapter's name, the key's digest
    who: str  # the same in words that its client may see
    max_requests: int | None = None  # under way at once; None: no limit
    tokens_per_minute: int | None = None  # of prompts and answers

    @property
    def limits_something(self) -> bool:
        return self.max_requests is not None or self.tokens_per_minute is not None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Immutable wish from a protocol: `n` choices over each prompt, or one vector of each.

    Choices are numbered prompt by prompt: number `prompt * n + i` is the i-th one over that prompt.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]  # at least one, of at least one token each
    sampling: SamplingParams
    stop: StopCriteria
    adapter: AdapterUse | None = None  # None = the base model
    n: int = 1
    received: float = 0.0  # monotonic seconds at which the HTTP request arrived
    pooling: Pooling | None = None  # None: generate; else a vector of each prompt is all that is made
    tenant: str = ""  # who is charged for it where shares are fair
    weight: float = 1.0  # of the tenant's share
    quotas: tuple[Quota, ...] = ()  # hard limits; none by default
    # The adapter is active in a prompt from the last place on that has these, and not at all in one without.
    invocation_tokens: tuple[int, ...] = ()  # (): from the first token on

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    def prompt_of(self, choice: int) -> tuple[int, ...]:
        """The prompt that the choice of this number continues."""
        return self.prompts[choice // self.n]


@dataclass(frozen=True, slots=True)
class Retired:
    """What taking an adapter out of use came to."""

    ref: AdapterRef
    freed_bytes: int  # of host memory
    ended: int  # requests that were ended by force
    users: int  # requests that go on with it


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that might have been, with the log-probability of the model's own distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one choice."""

    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int  # prompt tokens taken from the prefix cache


@dataclass(frozen=True, slots=True)
class Timing:
    """When things happened to one choice, in monotonic seconds of the service's clock."""

    received: float  # HTTP request arrived
    queued: float  # handed to the engine
    started: float  # first scheduled
    first_token: float
    last_token: float

    @property
    def queue_s(self) -> float:
        return self.started - self.queued

    @property
    def time_to_first_token_s(self) -> float:
        return self.first_token - self.received

    @property
    def total_s(self) -> float:
        return self.last_token - self.received


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a choice."""

    reason: FinishReason
    generated_text: str
    usage: Usage
    timing: Timing
    seed: int
    stop: str | int | None = (
        None  # matched stop string or stop token id; None with STOP: end-of-sequence token
    )
    error: str | None = None  # client-safe message with ERROR and ABORT


class GeneratedToken(NamedTuple):
    """One token of an answer, or of a prompt whose log-probabilities were asked for."""

    id: int
    text: str  # its own share of the text, special tokens spelled out; "" while a character is incomplete
    is_special: bool
    logprob: float | None = None  # None: not asked for, or nothing comes before the token
    alternatives: tuple[Alternative, ...] = ()


class TokenEvent(NamedTuple):
    """What a stream yields: one per sampled token, and at least one per choice, the last with `finish`."""

    index: int  # type: ignore[assignment]  # which of the request's choices, and not the method of tuples
    text: (
        str  # text that is now certain to be part of the answer; held back while a stop string may be forming
    )
    token: GeneratedToken | None = (
        None  # None only when a choice ends without a token (abort, error, max_tokens 0)
    )
    finish: Finish | None = None
    prompt: tuple[GeneratedToken, ...] = ()  # all of it, on the first event where num_prompt_logprobs is set
    vector: tuple[float, ...] | None = (
        None  # of length 1, on the only event of a choice where `pooling` is set
    )
