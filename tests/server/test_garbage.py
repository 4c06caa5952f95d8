"""Full collections over what the libraries brought along are rare."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from server.garbage import collect_nothing, collect_seldom, keep_all


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
