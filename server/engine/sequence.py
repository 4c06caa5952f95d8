"""One choice being generated, as the engine thread sees it.

    tokens   [ prompt ....................... | generated .......... ]
               0          num_cached             num_prompt            num_tokens
             [ computed: KV is in the blocks         | to compute ... ]
               0                                       num_computed

`num_computed <= num_tokens` always. A step computes some of [num_computed, num_tokens); a step that reaches
the end samples one more token. Chunked prefill, a prefix hit and a resume after preemption are therefore the
same case: only `num_computed` differs. A sequence that is asked about its prompt alone (log-probabilities, or
a vector) samples nothing and ends with the step that reaches its end.
"""

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NewType

from adapters.types import AdapterUse
from server.types import Pooling, SamplingParams, StopCriteria

SequenceId = NewType("SequenceId", int)
"""Unique for the life of the process; given out by the service in rising order."""

BlockKey = NewType("BlockKey", bytes)
"""Digest of a full block's tokens, of all tokens before them and of the adapter; see `blocks.py`."""


@dataclass(frozen=True, slots=True)
class BlockContent:
    """What a full block holds: the tokens, after everything that `parent` stands for."""

    key: BlockKey
    parent: BlockKey
    tokens: tuple[int, ...]


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class WaitReason(Enum):
    """Why a WAITING sequence was not admitted by the last step; see `Scheduler.wait_reason`."""

    CAPACITY = auto()  # the batch is full, or the step's token budget is spent
    BLOCKS = auto()  # not enough free KV blocks
    ADAPTER = auto()  # its adapter is not resident and there is no room for it
    READER = auto()  # its client does not read, or is not there


@dataclass(slots=True)
class TokenCounts:
    """Which tokens a sequence holds, and how often it has generated each.

    What `update` costs depends on the number of new tokens, not on the context. Arrays of machine numbers,
    because every step of a sequence with penalties copies them as they are.
    """

    held: "array[int]" = field(default_factory=lambda: array("q"))  # distinct ids of prompt and output
    generated: "array[int]" = field(default_factory=lambda: array("q"))  # distinct ids of the output
    counts: "array[float]" = field(default_factory=lambda: array("d"))  # how often each of `generated` came
    num_counted: int = 0  # tokens of the sequence that are in here
    _held: set[int] = field(default_factory=set)
    _places: dict[int, int] = field(default_factory=dict)  # of ids in `generated`

    def update(self, tokens: list[int], num_prompt: int) -> None:
        """Take in what has been appended to `tokens`, of which the first `num_prompt` are the prompt."""
        new = [token for token in dict.fromkeys(tokens[self.num_counted :]) if token not in self._held]
        self._held.update(new)
        self.held.extend(new)
        for token in tokens[max(self.num_counted, num_prompt) :]:
            place = self._places.setdefault(token, len(self.generated))
            if place == len(self.generated):
                self.generated.append(token)
                self.counts.append(0.0)
            self.counts[place] += 1.0
        self.num_counted = len(tokens)


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable, owned by the engine thread alone. Equal only to itself."""

    id: SequenceId
    tokens: list[int]  # prompt, then generated
    num_prompt: int
    sampling: SamplingParams
    stop: StopCriteria
    seed: int
    adapter: AdapterUse | None
    arrival: float  # clock seconds at which the engine took it in
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens taken from the prefix cache at first admission
    started: float | None = None  # clock seconds of the first admission
    is_paused: bool = False  # its client does not read, or is not there
    block_table: list[int] = field(default_factory=list)  # block i holds positions [i * size, (i + 1) * size)
    # Of its first full blocks, made when first needed.
    block_contents: list[BlockContent] = field(default_factory=list)
    # Of its first tokens; only what asks for penalties brings it up to date.
    token_counts: TokenCounts = field(default_factory=TokenCounts)
    pooling: Pooling | None = None
    # The runner's: what it has summed up of a prompt that comes in chunks. Begins anew with position 0.
    pooled: object | None = None
    tenant: str = ""  # who is charged for it where shares are fair
    weight: float = 1.0  # of the tenant's share
    num_charged: int = 0  # first tokens that are paid for
    last_step: int = 0  # number of the step that has computed some of it last
    adapter_start: int = 0  # the adapter is active from this position on: before it, KV is the base's
    num_scored: int = 0  # prompt tokens, from the second on, whose log-probability has been told

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def is_prompt_only(self) -> bool:
        """Whether it ends when its prompt is computed, and no token is drawn."""
        return self.stop.max_tokens <= 0 or self.pooling is not None

    @property
    def is_unscored(self) -> bool:
        """Whether log-probabilities of its prompt are still to be told."""
        return self.sampling.num_prompt_logprobs is not None and self.num_scored < self.num_prompt - 1

    @property
    def may_share_prefix(self) -> bool:
        """Whether the prefix cache may stand for its first tokens: it holds keys and values, so not where
        something else is wanted of each token.
        """
        return not self.is_unscored and self.pooling is not Pooling.MEAN
