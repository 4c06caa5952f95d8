"""Failures are believed for a while, for longer each time, and only while the files are the same."""

import pytest

from adapters.errors import AdapterInvalid, AdapterUnavailable
from adapters.failures import Failures
from tests.adapters.fake_files import FakeClock


def patience(failures: Failures, clock: FakeClock, key: str = "a", signature: object = 1) -> float:
    """Seconds until the failure is not believed any more, to half a second."""
    begun = clock.now
    while True:
        try:
            failures.repeat(key, signature)
        except (AdapterInvalid, AdapterUnavailable):
            clock.now += 0.5
        else:
            return clock.now - begun


def test_a_failure_that_comes_again_is_believed_for_longer_up_to_a_limit() -> None:
    failures = Failures(clock := FakeClock())
    believed = []
    for _ in range(8):
        failures.remember("a", 1, AdapterInvalid("broken"))
        believed.append(patience(failures, clock))

    assert believed == [5, 10, 20, 40, 80, 120, 120, 120]


def test_files_that_have_changed_are_not_believed_to_be_broken() -> None:
    failures = Failures(clock := FakeClock())
    failures.remember("a", 1, AdapterInvalid("broken"))
    failures.remember("a", 1, AdapterInvalid("broken"))

    failures.repeat("a", 2)

    failures.remember("a", 2, AdapterInvalid("broken again"))
    assert patience(failures, clock, signature=2) == 5


def test_what_is_only_away_is_asked_again_soon() -> None:
    failures = Failures(clock := FakeClock())
    for _ in range(3):
        failures.remember("a", 1, AdapterUnavailable("the hub does not answer", retry_after_s=5))
        assert patience(failures, clock) == 5


def test_success_makes_the_next_failure_the_first_one() -> None:
    failures = Failures(clock := FakeClock())
    failures.remember("a", 1, AdapterInvalid("broken"))
    failures.forget("a")
    failures.repeat("a", 1)

    failures.remember("a", 1, AdapterInvalid("broken"))
    assert patience(failures, clock) == 5


def test_the_table_is_bounded() -> None:
    failures = Failures(FakeClock())
    for number in range(3000):
        failures.remember(number, 1, AdapterInvalid("broken"))

    failures.repeat(0, 1)
    with pytest.raises(AdapterInvalid):
        failures.repeat(2999, 1)
    assert len(failures._known) == 1024


def test_a_remembered_failure_keeps_nothing_alive_of_what_was_read() -> None:
    failures = Failures(FakeClock())
    broken = AdapterInvalid("broken")
    try:
        raise broken from ValueError("with frames of its own")
    except AdapterInvalid as error:
        failures.remember("a", 1, error)

    for _ in range(2):
        with pytest.raises(AdapterInvalid) as again:
            failures.repeat("a", 1)
        assert again.value.__cause__ is None
        assert [frame.name for frame in again.traceback][1:] == ["repeat"]
