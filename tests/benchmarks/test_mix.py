import itertools
from collections import Counter

import pytest

from benchmarks.mix import Mix, choices

NAMES = ("a", "b", "c", "d")


def first(count: int, mix: Mix, *, seed: str = "0", alpha: float = 1.0) -> list[str]:
    return list(itertools.islice(choices(mix, NAMES, seed, alpha), count))


def test_one_asks_for_the_first_only() -> None:
    assert set(first(100, Mix.ONE)) == {"a"}


def test_distinct_neighbours_never_agree() -> None:
    names = first(40, Mix.DISTINCT)
    assert all(len(set(names[i : i + 4])) == 4 for i in range(37))


def test_uniform_gives_everybody_the_same_share() -> None:
    counts = Counter(first(20_000, Mix.UNIFORM))
    assert all(counts[name] == pytest.approx(5000, rel=0.06) for name in NAMES)


@pytest.mark.parametrize("alpha", [0.7, 1.0, 2.0])
def test_zipf_shares_fall_with_a_power_of_the_place(alpha: float) -> None:
    counts = Counter(first(40_000, Mix.ZIPF, alpha=alpha))
    for place, name in enumerate(NAMES):
        assert counts[name] / counts["a"] == pytest.approx((place + 1) ** -alpha, rel=0.12)


@pytest.mark.parametrize("mix", list(Mix))
def test_a_mix_is_decided_by_its_seed(mix: Mix) -> None:
    assert first(64, mix, seed="x") == first(64, mix, seed="x")


def test_seeds_differ() -> None:
    assert first(64, Mix.UNIFORM, seed="x") != first(64, Mix.UNIFORM, seed="y")


def test_nobody_to_ask_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        choices(Mix.ONE, (), "0")
