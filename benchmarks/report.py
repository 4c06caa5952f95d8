"""A run as text for people and as JSON for programs; both are computed from the same summaries."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.metrics import Spread, Summary, by_adapter, percentile, spread, summarize
from benchmarks.records import BASE, Level, Shot

LAG_WARNING_S = 0.02
MAX_ADAPTER_ROWS = 20
CURVE_POINTS = 200


def level_table(levels: Sequence[Level]) -> str:
    """One column a level, one line a number."""
    summaries = [summarize(level.shots, level.wall) for level in levels]
    has_schedule = any(level.kind == "rate" for level in levels)
    rows: list[tuple[str, list[str]]] = [
        ("", [level.title for level in levels]),
        ("requests (failed)", [_requests(s) for s in summaries]),
        (
            "output tokens/s",
            [("" if s.is_exact else "~") + _number(s.output_tokens_per_s) for s in summaries],
        ),
        ("total tokens/s", [_number(s.total_tokens_per_s) for s in summaries]),
        ("requests/s", [_number(s.requests_per_s, 2) for s in summaries]),
        ("prompt tokens p50", [_number(s.prompt_tokens_p50, 0) for s in summaries]),
        ("time to first token, ms", [_triple(s.ttft, 1e3) for s in summaries]),
        ("inter-token latency, ms", [_triple(s.gap, 1e3) for s in summaries]),
        ("time per output token, ms", [_triple(s.per_token, 1e3) for s in summaries]),
        ("end to end, s", [_triple(s.total, 1.0) for s in summaries]),
    ]
    if has_schedule:  # what a user feels whose request left late
        rows.append(("first token from schedule, ms", [_triple(s.ttft_scheduled, 1e3) for s in summaries]))
        rows.append(("end to end from schedule, s", [_triple(s.total_scheduled, 1.0) for s in summaries]))
    lags = [spread(level.loop_lags) for level in levels]
    rows.append(("lag of this client, ms", [_triple(lag, 1e3) for lag in lags]))
    notes = ["latencies are p50 / p90 / p99"]
    if not all(s.is_exact for s in summaries):
        notes.append("~: the server gives no usage, chunks are counted")
    lines = [*columns(rows), "", "; ".join(notes) + "."]
    if any(lag.p99 > LAG_WARNING_S for lag in lags):
        lines.append(
            "This client itself ran late, so part of these latencies is its own: give it a free core."
        )
    return "\n".join(lines)


def adapter_table(level: Level) -> str:
    """One line an adapter, for one level."""
    groups = by_adapter(level)
    rows = [
        (
            f"adapters at {level.title}",
            ["requests", "tokens/s", "first token, ms", "inter-token, ms", "end, s"],
        )
    ]
    for name, summary in list(groups.items())[:MAX_ADAPTER_ROWS]:
        numbers = [_requests(summary), _number(summary.output_tokens_per_s)]
        numbers += [_triple(summary.ttft, 1e3), _triple(summary.gap, 1e3), _triple(summary.total, 1.0)]
        rows.append((adapter_title(name), numbers))
    if len(groups) > MAX_ADAPTER_ROWS:
        rows.append((f"... and {len(groups) - MAX_ADAPTER_ROWS} more, in the JSON", [""] * 5))
    return "\n".join(columns(rows))


def failure_lines(level: Level) -> list[str]:
    """Each kind of failure with its count and the first message of that kind."""
    first: dict[str, Shot] = {}
    for shot in level.shots:
        if shot.failure is not None:
            first.setdefault(shot.failure, shot)
    kinds = summarize(level.shots, level.wall).failures
    return [f"{level.title}: {count} x {kind}, first: {first[kind].message}" for kind, count in kinds]


def adapter_title(name: str) -> str:
    return "(base model)" if name == BASE else name


def as_json(levels: Sequence[Level], about: Mapping[str, object]) -> dict[str, object]:
    """The whole run. `about` is what the command line adds: date, command, machine, server, settings."""
    return {**about, "levels": [_level_json(level) for level in levels]}


def write_json(path: Path, run: Mapping[str, object]) -> None:
    path.write_text(json.dumps(_finite(run), indent=1) + "\n")


def _level_json(level: Level) -> dict[str, object]:
    gaps = sorted(gap for shot in level.good for gap in shot.gaps)
    return {
        level.kind: level.value,
        "summary": asdict(summarize(level.shots, level.wall)),
        "adapters": {name: asdict(summary) for name, summary in by_adapter(level).items()},
        "client_lag": asdict(spread(level.loop_lags)),
        # The gaps themselves would be most of the file: their quantiles draw the same curve.
        "gap_quantiles": [percentile(gaps, i / CURVE_POINTS) for i in range(CURVE_POINTS + 1)]
        if gaps
        else [],
        "requests": [
            _shot_json(shot, level) for shot in sorted(level.shots, key=lambda shot: shot.scheduled)
        ],
    }


def _shot_json(shot: Shot, level: Level) -> dict[str, object]:
    began = min(other.scheduled for other in level.shots)
    return {
        "adapter": shot.adapter,
        "scheduled": shot.scheduled - began,
        "sent": shot.sent - began,
        "ttft": shot.ttft,
        "total": shot.total,
        "tokens": shot.tokens,
        "prompt_tokens": shot.prompt_tokens,
        "cached_tokens": shot.cached_tokens,
        "finish": shot.finish,
        "failure": shot.failure,
        "message": shot.message or None,
    }


def _finite(value: object) -> object:
    """NaN is not JSON: what could not be measured is null."""
    if isinstance(value, float):
        return round(value, 7) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def columns(rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Names to the left, numbers to the right, each column as wide as it needs."""
    name_width = max(len(name) for name, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(rows[0][1]))]
    return [
        f"{name:<{name_width}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]


def _requests(summary: Summary) -> str:
    return f"{summary.requests} ({summary.failed})" if summary.failed else str(summary.requests)


def _number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _triple(values: Spread, scale: float) -> str:
    if not values.count:
        return "-"
    numbers = [value * scale for value in (values.p50, values.p90, values.p99)]
    digits = 0 if numbers[0] >= 100 else 1 if numbers[0] >= 10 else 2
    return " / ".join(f"{number:.{digits}f}" for number in numbers)
