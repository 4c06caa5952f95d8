"""Full collections over what the libraries brought along are rare."""

import gc
from collections.abc import Iterator

import pytest

from server.garbage import collect_seldom


@pytest.fixture(autouse=True)
def _own_collector() -> Iterator[None]:
    """The settings hold for the whole process: put them back."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def test_what_was_there_is_never_looked_through_again() -> None:
    before = len(gc.get_objects())
    collect_seldom()
    assert gc.get_freeze_count() > before / 2
    assert len(gc.get_objects()) < before / 2


def test_cycles_of_a_busy_server_are_still_collected() -> None:
    collect_seldom()
    full = gc.get_stats()[2]["collections"], gc.get_stats()[0]["collections"]
    kept = []
    for _ in range(30_000):
        cycle: list[object] = []
        cycle.append(cycle)
        kept = cycle
    assert kept
    assert gc.get_stats()[0]["collections"] > full[1]
    assert gc.get_stats()[2]["collections"] == full[0]
