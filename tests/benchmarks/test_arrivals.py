import itertools
from statistics import mean, pstdev

import pytest

from benchmarks.arrivals import Arrival, offsets


def first(count: int, arrival: Arrival, rate: float, seed: str = "0") -> list[float]:
    return list(itertools.islice(offsets(arrival, rate, seed), count))


def test_a_constant_schedule_does_not_drift() -> None:
    assert first(4, Arrival.CONSTANT, 4.0) == [0.0, 0.25, 0.5, 0.75]
    assert first(30_001, Arrival.CONSTANT, 3.0)[-1] == 10_000.0


def test_a_schedule_is_decided_by_its_seed() -> None:
    assert first(50, Arrival.POISSON, 7.0, "a") == first(50, Arrival.POISSON, 7.0, "a")
    assert first(50, Arrival.POISSON, 7.0, "a") != first(50, Arrival.POISSON, 7.0, "b")


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_poisson_gaps_are_exponential(rate: float) -> None:
    at = first(20_001, Arrival.POISSON, rate, "gaps")
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert min(gaps) >= 0
    assert mean(gaps) == pytest.approx(1 / rate, rel=0.03)
    assert pstdev(gaps) == pytest.approx(1 / rate, rel=0.05)  # as large as the mean: a memoryless process


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        next(offsets(Arrival.POISSON, 0.0, "0"))
