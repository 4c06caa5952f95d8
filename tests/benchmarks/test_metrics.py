import math

import numpy as np
import pytest

from benchmarks.metrics import by_adapter, percentile, spread, summarize
from benchmarks.records import Level, Shot
from benchmarks.report import as_json, level_table


def shot(adapter: str = "a", *, at: float = 10.0, tokens: int = 5, failure: str | None = None) -> Shot:
    """Leaves a second late, has its first text after 2 s, then a chunk a second."""
    answer = Shot(adapter=adapter, scheduled=at - 1, sent=at, failure=failure)
    if failure is None:
        answer.first, answer.last, answer.done = at + 2, at + 1 + tokens, at + 1 + tokens
        answer.gaps, answer.chunks = [1.0] * (tokens - 1), tokens
        answer.output_tokens, answer.prompt_tokens = tokens, 7
    else:
        answer.done = at + 1
    return answer


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_are_those_of_numpy(seed: int) -> None:
    values = sorted(np.random.default_rng(seed).normal(size=seed * 13 + 1).tolist())
    for share in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)))


def test_nothing_has_no_percentile() -> None:
    assert math.isnan(percentile([], 0.5))
    assert spread([None, None]).count == 0


def test_a_shot_measures_from_sending_and_from_the_schedule() -> None:
    answer = shot()
    assert (answer.ttft, answer.ttft_scheduled) == (2, 3)
    assert (answer.total, answer.total_scheduled) == (6, 7)
    assert answer.per_token == 1.0


def test_time_per_token_goes_by_tokens_and_not_by_chunks() -> None:
    answer = shot(tokens=5)
    answer.output_tokens = 9  # four chunks held two tokens
    assert answer.per_token == 0.5


def test_one_token_has_no_time_per_token() -> None:
    assert shot(tokens=1).per_token is None


def test_failures_count_nowhere_but_in_the_failures() -> None:
    shots = [shot(), shot(), *[shot(failure="http 429")] * 3, shot(failure="cut off")]
    summary = summarize(shots, wall=10.0)
    assert summary.failures == (("http 429", 3), ("cut off", 1))
    assert (summary.requests, summary.failed) == (6, 4)
    assert (summary.output_tokens_per_s, summary.total_tokens_per_s) == (1.0, 2.4)
    assert summary.requests_per_s == 0.2
    assert summary.total.count == 2


def test_totals_are_unknown_where_a_server_does_not_count_the_prompt() -> None:
    uncounted = shot()
    uncounted.prompt_tokens = None
    assert math.isnan(summarize([shot(), uncounted], 1.0).total_tokens_per_s)


def test_each_adapter_has_its_part_of_the_level() -> None:
    level = Level("concurrency", 2, (shot("b"), shot("a"), shot("b")), 5.0, (0.001,))
    groups = by_adapter(level)
    assert list(groups) == ["a", "b"]
    assert sum(group.output_tokens_per_s for group in groups.values()) == pytest.approx(
        summarize(level.shots, level.wall).output_tokens_per_s
    )


def test_a_late_client_is_told_so() -> None:
    calm = Level("concurrency", 1, (shot(),), 5.0, (0.001,) * 50)
    late = Level("concurrency", 1, (shot(),), 5.0, (0.1,) * 50)
    assert "ran late" not in level_table([calm])
    assert "ran late" in level_table([late])


def test_a_level_of_failures_alone_can_be_shown_and_stored() -> None:
    level = Level("rate", 2.5, (shot(failure="timeout"),), 5.0, ())
    assert "1 (1)" in level_table([level])
    assert as_json([level], {})["levels"]
