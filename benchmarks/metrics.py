"""Numbers out of shots: percentiles, rates, failures by kind, for a level and for each of its adapters.

Percentiles interpolate between the two neighbours (numpy's default, and that of the other load generators),
so that p99 of few values is not simply the largest. Failed requests count in the failures and nowhere else.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.records import Level, Shot

QUANTILES = (0.5, 0.9, 0.99)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered values lie; NaN of nothing."""
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Spread:
    """A set of seconds in a few numbers; NaN where there are none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    largest: float


def spread(values: Iterable[float | None]) -> Spread:
    """Of those that are there."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return Spread(0, *[math.nan] * 5)
    p50, p90, p99 = (percentile(ordered, share) for share in QUANTILES)
    return Spread(len(ordered), sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class Summary:
    """A level, or one adapter's part of it."""

    requests: int
    failures: tuple[tuple[str, int], ...]  # kind and count, the most frequent first
    wall: float
    requests_per_s: float  # good ones
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float  # with prompt tokens; NaN if the server does not count them
    is_exact: bool  # the server counted the output tokens of every good answer
    prompt_tokens_p50: float
    cached_tokens: int | None
    ttft: Spread
    ttft_scheduled: Spread
    gap: Spread  # inter-token latency: between chunks with text
    per_token: Spread  # time per output token, one value a request
    total: Spread
    total_scheduled: Spread

    @property
    def failed(self) -> int:
        return sum(count for _, count in self.failures)


def summarize(shots: Sequence[Shot], wall: float) -> Summary:
    good = [shot for shot in shots if shot.failure is None]
    failures = Counter(shot.failure for shot in shots if shot.failure is not None)
    output = sum(shot.tokens for shot in good)
    prompts = [shot.prompt_tokens for shot in good if shot.prompt_tokens is not None]
    cached = [shot.cached_tokens for shot in good if shot.cached_tokens is not None]
    counts_prompts = bool(good) and len(prompts) == len(good)
    return Summary(
        requests=len(shots),
        failures=tuple(failures.most_common()),
        wall=wall,
        requests_per_s=_rate(len(good), wall),
        output_tokens=output,
        output_tokens_per_s=_rate(output, wall),
        total_tokens_per_s=_rate(output + sum(prompts), wall) if counts_prompts else math.nan,
        is_exact=all(shot.output_tokens is not None for shot in good),
        prompt_tokens_p50=percentile(sorted(prompts), 0.5),
        cached_tokens=sum(cached) if cached else None,
        ttft=spread(shot.ttft for shot in good),
        ttft_scheduled=spread(shot.ttft_scheduled for shot in good),
        gap=spread(gap for shot in good for gap in shot.gaps),
        per_token=spread(shot.per_token for shot in good),
        total=spread(shot.total for shot in good),
        total_scheduled=spread(shot.total_scheduled for shot in good),
    )


def by_adapter(level: Level) -> dict[str, Summary]:
    """Each adapter's part of the level, by name; rates are shares of the level's, over its wall time."""
    groups: dict[str, list[Shot]] = {}
    for shot in level.shots:
        groups.setdefault(shot.adapter, []).append(shot)
    return {name: summarize(groups[name], level.wall) for name in sorted(groups)}


def _rate(count: float, wall: float) -> float:
    return count / wall if wall > 0 else math.nan
