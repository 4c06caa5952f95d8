"""What tests of several packages share."""

from functools import partial

import pytest

from tests.nursery import Nursery


def pytest_configure(config: pytest.Config) -> None:
    """Files begin in their order. xdist would begin with those of many tests and end with those of long ones,
    the last of which would keep one process busy and the other idle.
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(scope="session")
def nursery() -> Nursery:
    """Where servers come from in a fraction of a second."""
    return Nursery()


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks ask a server how long some words are, and not a thousand times."""
    from benchmarks import prompts, run

    briefly = partial(prompts.calibrate, words=prompts.WORDS[:200])
    for module in (prompts, run):
        monkeypatch.setattr(module, "calibrate", briefly)
