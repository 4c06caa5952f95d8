"""How long steps may be in company: as long as a guest's prompt takes, going by what was measured."""

import pytest

from server.engine.company import Company
from tests.fakes import FakeClock


def company(first_tokens: int | None = 16) -> tuple[Company, FakeClock]:
    clock = FakeClock()
    return Company(first_tokens, clock), clock


def test_a_tenant_alone_has_no_bound() -> None:
    steps, _ = company()
    assert steps.max_crowd_tokens(1) is None


def test_where_the_length_of_a_step_does_not_matter_there_is_never_a_bound() -> None:
    steps, _ = company(None)
    steps.observe(0.1, 64, is_guests=False)
    steps.observe(0.1, 64, is_guests=True)
    assert steps.max_crowd_tokens(5) is None


def test_the_first_bound_holds_until_both_times_are_known_and_for_some_seconds_after_the_others_left() -> (
    None
):
    steps, clock = company()
    steps.observe(0.1, 64, is_guests=False)
    assert steps.max_crowd_tokens(2) == 16
    clock.advance(4.9)
    assert steps.max_crowd_tokens(1) == 16
    clock.advance(0.2)
    assert steps.max_crowd_tokens(1) is None


@pytest.mark.parametrize(("guest_s", "expected"), [(0.02, 23), (0.4, 457), (0.0001, 16)])
def test_a_crowd_gets_as_many_tokens_as_take_two_thirds_of_a_guests_step(
    guest_s: float, expected: int
) -> None:
    steps, _ = company()
    steps.observe(64 * 0.0007, 64, is_guests=False)
    for _ in range(3):
        steps.observe(guest_s, 64, is_guests=True)
    assert steps.max_crowd_tokens(2) == expected


def test_guests_whose_steps_a_burst_held_up_do_not_make_long_steps() -> None:
    steps, _ = company()
    steps.observe(64 * 0.0007, 64, is_guests=False)
    for guest_s in (0.4, 0.3):
        steps.observe(guest_s, 64, is_guests=True)
        assert steps.max_crowd_tokens(2) == 16
    for guest_s in (0.02, 0.4, 0.4, 0.4, 0.4):
        steps.observe(guest_s, 64, is_guests=True)
        assert steps.max_crowd_tokens(2) == 23


def test_what_is_known_follows_the_newest_steps() -> None:
    steps, _ = company()
    for _ in range(30):
        steps.observe(0.064, 64, is_guests=False)
        steps.observe(0.02, 64, is_guests=True)
    assert steps.max_crowd_tokens(2) == 16
    for _ in range(30):
        steps.observe(0.1, 64, is_guests=True)
    assert steps.max_crowd_tokens(2) == pytest.approx(80, abs=1)


def test_steps_of_few_tokens_say_nothing_about_a_crowd() -> None:
    steps, _ = company()
    steps.observe(0.5, 1, is_guests=False)
    for _ in range(3):
        steps.observe(0.02, 64, is_guests=True)
    assert steps.max_crowd_tokens(2) == 16
