"""Plain numbers about requests, adapter by adapter, counted in a fraction of a microsecond each.

Every request counts into the meter of its adapter and nowhere else; what the server did as a whole is the sum
of all meters. Histograms are kept with fine bounds, and whoever shows them for each adapter takes some of the
bounds only.

An adapter's name is a label in somebody's time-series database, where each costs memory for as long as it is
kept. Hence, of the meters with a name:

* There are at most so many. Adapters beyond them share "other", as does what is no adapter of its own: a name
  that nobody registered, such as that of several adapters at once, is a client's to choose.
* One whose adapter is not registered any more goes after five quiet minutes, when whoever scrapes has seen
  its last numbers.
* One that nobody has used for an hour, or that was only loaded, goes when another adapter wants a name. (The
  longest unused would be the obvious one to go; with more adapters than names that would make new labels all
  the time, and the bound would bound nothing.)

A meter that goes takes its label along, so that the database sees a series end. Its counts are not added to
"other", where they would look like a burst of requests; they stay in the sum, which never falls. If its
adapter comes back, its series begins at zero again, as after a restart.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from adapters.types import Clock
from server.types import FinishReason

BASE_LABEL = "__base_model__"
OTHER_LABEL = "other"
_FORGET_UNKNOWN_S = 300.0  # some intervals of whoever scrapes
_FORGET_UNUSED_S = 3600.0

TOKEN_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.035,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Example(NamedTuple):
    """A request that was counted."""

    at: float  # in seconds of the clock
    request_id: str
    value: float


class Histogram:
    """Counts per bucket; (bounds[i-1], bounds[i]] is bucket i, the last one is open.

    `examples`: by bucket, the newest that was counted there with an example.
    """

    __slots__ = ("bounds", "counts", "examples", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.examples: dict[int, Example] = {}

    def observe(self, value: float, request_id: str | None = None, at: float = 0.0) -> None:
        """`at`: when, if there is a request to be an example of it."""
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.total += value
        if request_id is not None:
            self.examples[bucket] = Example(at, request_id, value)

    def add(self, other: "Histogram") -> None:
        """The observations of another one with the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total
        for bucket, example in other.examples.items():
            self.examples[bucket] = max(example, self.examples.get(bucket, example))

    def copy(self) -> "Histogram":
        copy = Histogram(self.bounds)
        copy.add(self)
        return copy

    @property
    def count(self) -> int:
        return sum(self.counts)


class Meter:
    """What one adapter, or the base model, was used for."""

    __slots__ = (
        "finished",
        "first_token",
        "gap",
        "generated_tokens",
        "load",
        "num_begun",
        "num_live",
        "prompt_tokens",
        "queue",
        "used_at",
    )

    def __init__(self, now: float) -> None:
        self.num_begun = 0  # requests that were accepted
        self.num_live = 0  # those that are not over
        self.used_at = now
        self.finished = dict.fromkeys(FinishReason, 0)  # requests that are over
        self.prompt_tokens = 0  # of those
        self.generated_tokens = 0
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.gap = Histogram(TOKEN_SECONDS)  # between two tokens of a choice
        self.queue = Histogram(REQUEST_SECONDS)
        self.load = Histogram(REQUEST_SECONDS)  # reading and checking its files

    def add(self, other: "Meter") -> None:
        """The counts of another one."""
        for reason, count in other.finished.items():
            self.finished[reason] += count
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens
        self.first_token.add(other.first_token)
        self.gap.add(other.gap)
        self.queue.add(other.queue)
        self.load.add(other.load)
        self.num_begun += other.num_begun
        self.num_live += other.num_live

    def copy(self) -> "Meter":
        copy = Meter(self.used_at)
        copy.add(self)
        return copy


class Meters:
    """One meter for each of a bounded number of adapters, one for the base model, one for all others."""

    def __init__(self, max_adapters: int, is_known: Callable[[str], bool], clock: Clock) -> None:
        """`is_known`: whether an adapter of that name is registered."""
        self._max_adapters = max_adapters
        self._is_known = is_known
        self._clock = clock
        self._base = Meter(clock())
        self._other: Meter | None = None
        self._of: dict[str, Meter] = {}
        self._gone = Meter(clock())  # the sum of those that went

    def begin(self, adapter: str | None) -> Meter:
        """The meter for a request that was accepted; `end` follows. None: the base model."""
        meter = self._base if adapter is None else self.of(adapter)
        meter.num_begun += 1
        meter.num_live += 1
        meter.used_at = self._clock()
        return meter

    def end(self, meter: Meter) -> None:
        """The request is over."""
        meter.num_live -= 1
        meter.used_at = self._clock()

    def of(self, adapter: str) -> Meter:
        """The meter of an adapter, a new one if there is room, or else the one that it shares."""
        meter = self._of.get(adapter)
        if meter is not None:
            return meter
        if not self._is_known(adapter) or not self._has_room():
            if self._other is None:
                self._other = Meter(self._clock())
            return self._other
        meter = self._of[adapter] = Meter(self._clock())
        return meter

    def forget_unknown(self) -> None:
        """Let those go whose adapters were unloaded some time ago."""
        for name in [name for name, meter in self._of.items() if self._is_over(name, meter)]:
            self._forget(name)

    def items(self) -> Iterator[tuple[str, Meter]]:
        """Labels and meters: the base model, adapters in order of first use, others."""
        yield BASE_LABEL, self._base
        yield from self._of.items()
        if self._other is not None:
            yield OTHER_LABEL, self._other

    def sum(self) -> Meter:
        """All that was ever counted."""
        total = self._gone.copy()
        for _, meter in self.items():
            total.add(meter)
        return total

    def _has_room(self) -> bool:
        """Whether there is a name to be had, after letting one go if need be."""
        if len(self._of) < self._max_adapters:
            return True
        now = self._clock()
        for name, meter in self._of.items():
            is_unused = not meter.num_begun or now - meter.used_at >= _FORGET_UNUSED_S
            if (is_unused and not meter.num_live) or self._is_over(name, meter):
                self._forget(name)
                return True
        return False

    def _is_over(self, name: str, meter: Meter) -> bool:
        is_quiet = not meter.num_live and self._clock() - meter.used_at >= _FORGET_UNKNOWN_S
        return is_quiet and not self._is_known(name)

    def _forget(self, name: str) -> None:
        self._gone.add(self._of.pop(name))
