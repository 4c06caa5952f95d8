"""The records and the one interface between the shared path of a generation and the protocols.

A protocol is a `Wish`: it turns a body into a `Draft` and an `Accepted` request's events into bytes.
Everything between those two (names, prompts, lengths, queue, head, headers, disconnects) is in generation.py
and streaming.py, once for all.

In a protocol's package, wish.py (or a file for each kind of wish) reads bodies, schema.py says what is valid,
render.py writes answers, routes.py is the table, and chapter.py documents it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.api.ports import ModelCard, Tokenizer
from server.api.state import ApiOptions
from server.errors import ContextTooLong, ServeError
from server.types import Finish, GeneratedToken, GenerationRequest, Pooling, SamplingParams, TokenEvent
from server.wishes import NO_WISH, AdapterWish


@dataclass(frozen=True, slots=True)
class Shortening:
    """What becomes of a prompt of more than `beyond` tokens: a conversation loses its oldest turns, and what
    is still too long then loses what lies between its first tokens and its last ones.
    """

    beyond: int
    to: int  # so many are left,
    first: int  # and so many of them are the first ones


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt as it goes into the model."""

    text: str
    add_special_tokens: bool = True
    keep_last: int | None = None  # keep only this many tokens, the last ones
    shortening: Shortening | None = None  # None: a prompt that is too long is refused
    before: tuple[int, ...] = ()  # ids that come first: what the model has read and written until now
    param: str = "prompt"  # what the client calls it


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages, still to be put through the model's chat template."""

    messages: tuple[dict[str, object], ...]
    num_chars: int  # of all that a template may print
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False  # templates write the special tokens themselves
    keep_last: int | None = None
    shortening: Shortening | None = None
    before: tuple[int, ...] = ()
    param: str = "messages"


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that the client has tokenised."""

    ids: tuple[int, ...]
    param: str = "prompt"


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """A prompt that is ready for the engine, and its text."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Draft:
    """A GenerationRequest before its adapters are held and its prompts are ids."""

    model: str | None  # the name; what `adapter` lists stands in its place
    prompts: tuple[Prompt, ...]  # at least one
    sampling: SamplingParams
    max_tokens: int | None = None  # None: usual_max_tokens, and no more than the context leaves; 0: none
    is_cut_to_context: bool = False  # more max_tokens than the context leaves: fewer, not refused
    usual_max_tokens: int | None = None  # None: all that the context leaves
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    keep_stop: bool = False
    n: int = 1  # choices over each prompt
    pooling: Pooling | None = None  # not None: vectors of the prompts, and nothing is generated
    adapter: AdapterWish = NO_WISH


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that the engine has taken in: what headers and answers say about it."""

    request: GenerationRequest
    prompts: tuple[TokenisedPrompt, ...]
    card: ModelCard
    tokenizer: Tokenizer
    model: str  # what answers call the model: the adapter's name, that of several, or the base's first one
    adapter_source: str | None  # None: no adapter
    created: int  # unix seconds

    @property
    def prompt(self) -> TokenisedPrompt:
        """The first one, which for most protocols is the only one."""
        return self.prompts[0]

    def prompt_of(self, choice: int) -> TokenisedPrompt:
        """The prompt that the choice of this number continues."""
        return self.prompts[choice // self.request.n]


@dataclass(slots=True)
class Choice:
    """One choice of an answer that is not streamed, collected."""

    tokens: list[GeneratedToken] = field(default_factory=list)
    finish: Finish | None = None
    prompt: tuple[GeneratedToken, ...] = ()
    vector: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class WholeChoice:
    """One choice, complete."""

    tokens: tuple[GeneratedToken, ...]
    finish: Finish
    prompt: tuple[GeneratedToken, ...] = ()  # where num_prompt_logprobs is set
    vector: tuple[float, ...] | None = None  # where pooling is set


@dataclass(frozen=True, slots=True)
class Framing:
    """How the frames of a stream follow each other."""

    media_type: str
    keep_alive: bytes | None  # what may be written into silence; None: nothing that clients would pass over


EVENT_STREAM = Framing("text/event-stream", b": keep-alive\n\n")
JSON_LINES = Framing("application/x-ndjson", None)


class FrameWriter(Protocol):
    """Writes one stream; each item is one event, ready to be sent in one write."""

    @property
    def framing(self) -> Framing: ...

    def frames(self, events: Sequence[TokenEvent], *, join: bool) -> Iterable[bytes]:
        """`join`: the client reads slowly, so frames that lose nothing by it may become one."""
        ...

    def end(self) -> Iterable[bytes]:
        """After every choice's finish."""
        ...

    def failure(self, error: ServeError) -> Iterable[bytes]:
        """Instead of the rest."""
        ...


class Wish(Protocol):
    """One request in a protocol's own words."""

    @property
    def is_stream(self) -> bool: ...

    def draft(self, card: ModelCard, tokenizer: Tokenizer, options: ApiOptions) -> Draft:
        """Raises: BadRequest for values that are wrong or not served."""
        ...

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        """The protocol's own words for a prompt (and max_tokens, if given) beyond the context."""
        ...

    def writer(self, accepted: Accepted) -> FrameWriter: ...

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes: ...
