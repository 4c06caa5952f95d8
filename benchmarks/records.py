"""The records that the parts of the load generator exchange. Standard library only.

A `Target` is the server as the probe found it. A `Wish` is one request before it is sent, a `Shot` is what
became of it. A `Level` is one load (a concurrency or a rate) with all its shots; everything printed, stored
and drawn is computed from levels. Times are `perf_counter` seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

BASE = "__base_model__"
"""The name by which a mix asks for the base model."""


class Api(StrEnum):
    CHAT = "chat"
    COMPLETIONS = "completions"
    LORAX = "lorax"


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers."""

    url: str  # without a trailing slash and without /v1
    model: str  # its base model's name
    adapters: tuple[str, ...]  # what it lists with a parent
    server: str  # what it says it is, for the report; "" if nothing


@dataclass(frozen=True, slots=True)
class Wish:
    """One request to send."""

    adapter: str  # BASE or an adapter's name
    prompt: str
    max_tokens: int
    scheduled: float | None = None  # open loop: when it should leave; None: as soon as somebody is free


@dataclass(slots=True)
class Shot:
    """What became of one request. Filled in by the client while the answer arrives."""

    adapter: str
    scheduled: float  # when it should have left; the same as `sent` in a closed loop
    sent: float
    first: float | None = None  # first text arrived
    last: float | None = None  # last text arrived
    done: float = 0.0  # the answer was complete, or the failure known
    gaps: list[float] = field(default_factory=list)  # between chunks with text, seconds
    chunks: int = 0  # with text
    prompt_tokens: int | None = None  # as the server counts
    output_tokens: int | None = None  # as the server counts
    cached_tokens: int | None = None  # as the server counts
    finish: str | None = None
    failure: str | None = None  # its kind, short enough for a table row; None: a good answer
    message: str = ""  # what the server or the network said about the failure

    @property
    def tokens(self) -> int:
        """Output tokens: the server's count, or the number of chunks where it gives none."""
        return self.chunks if self.output_tokens is None else self.output_tokens

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first text."""
        return None if self.first is None else self.first - self.sent

    @property
    def ttft_scheduled(self) -> float | None:
        """Seconds to the first text from when the request should have left."""
        return None if self.first is None else self.first - self.scheduled

    @property
    def per_token(self) -> float | None:
        """Seconds for each output token after the first."""
        if self.first is None or self.last is None or self.tokens < 2 or self.last <= self.first:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    @property
    def total(self) -> float:
        return self.done - self.sent

    @property
    def total_scheduled(self) -> float:
        return self.done - self.scheduled


@dataclass(frozen=True, slots=True)
class Level:
    """One load and its answers."""

    kind: str  # "concurrency" or "rate"
    value: float
    shots: tuple[Shot, ...]
    wall: float  # seconds from the first send to the last end
    loop_lags: tuple[float, ...]  # how late the client's own event loop was, seconds

    @property
    def title(self) -> str:
        return f"c={self.value:g}" if self.kind == "concurrency" else f"{self.value:g}/s"

    @property
    def good(self) -> tuple[Shot, ...]:
        return tuple(shot for shot in self.shots if shot.failure is None)


@dataclass(frozen=True, slots=True)
class Wire:
    """How requests are put on the wire, the same for all of a run."""

    api: Api
    extra: Mapping[str, object]  # merged into the body, or into LoRAX's `parameters`
    api_key: str | None
    asks_usage: bool  # send stream_options.include_usage
    timeout_s: float
    keeps_alive: bool  # reuse connections between requests
