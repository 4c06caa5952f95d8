"""Full collections over what the libraries brought along are rare."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from server.garbage import collect_in_lull, collect_nothing, collect_seldom, keep_all


class _Owner:
    def __init__(self, owned: object) -> None:
        self.owned = owned


@pytest.fixture(autouse=True)
def _own_collector() -> Iterator[None]:
    """The settings hold for the whole process: put them back."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.enable()
    gc.unfreeze()


def test_nothing_is_looked_through_while_the_server_starts_and_everything_new_once_it_has() -> None:
    collect_nothing()
    keep_all()
    cycle: list[object] = []
    cycle.append(cycle)
    gone = weakref.finalize(cycle_owner := _Owner(cycle), lambda: None)
    cycle.append(cycle_owner)
    del cycle, cycle_owner
    kept = [[number] for number in range(10_000)]
    assert len(kept) == 10_000
    assert not gc.isenabled()
    assert gone.alive
    collect_seldom()
    assert gc.isenabled()
    assert not gone.alive


def test_what_was_there_is_never_looked_through_again() -> None:
    before = len(gc.get_objects())
    collect_seldom()
    assert gc.get_freeze_count() > before / 2
    assert len(gc.get_objects()) < before / 2


def test_a_lull_is_used_when_something_is_due_and_before_python_begins_by_itself() -> None:
    collect_seldom()
    before = gc.get_stats()[0]["collections"]
    kept = [[number] for number in range(1_000)]
    collect_in_lull()
    assert gc.get_stats()[0]["collections"] == before  # nothing is due yet
    kept += [[number] for number in range(2_000)]
    assert gc.get_stats()[0]["collections"] == before
    collect_in_lull()
    assert len(kept) == 3_000
    assert gc.get_stats()[0]["collections"] == before + 1
    assert gc.get_count()[0] < 1_000


def test_lulls_look_through_what_survives_as_seldom_as_python_would() -> None:
    collect_seldom()
    before = [generation["collections"] for generation in gc.get_stats()]
    kept = []
    for _ in range(25):
        kept += [[number] for number in range(3_000)]
        collect_in_lull()
    young, middle, old = (now["collections"] - was for now, was in zip(gc.get_stats(), before, strict=True))
    assert len(kept) == 75_000
    assert (young, middle, old) == (23, 2, 0)


def test_a_lull_of_a_server_that_starts_is_left_alone() -> None:
    collect_nothing()
    before = gc.get_stats()[0]["collections"]
    kept = [[number] for number in range(30_000)]
    collect_in_lull()
    assert len(kept) == 30_000
    assert gc.get_stats()[0]["collections"] == before


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
