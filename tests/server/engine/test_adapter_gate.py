"""More adapters than fit: who gets room, who is closed, pins, prefetches, what a failed step leaves behind;
nobody starves.
"""

from random import Random
from typing import Any

import pytest

from adapters.types import AdapterPart, AdapterRef, AdapterUse
from server.engine.plan import Pins
from server.engine.sequence import SequenceId, SequenceStatus, WaitReason
from server.types import FinishReason
from tests.fakes import Rig, adapter, make_rig

ANT, BEE, CAT, DOG = (adapter(name) for name in ("ant", "bee", "cat", "dog"))
ALIAS = adapter("ant-by-another-name", "r-ant")
PROMPT = [3, 1, 4, 1, 5]


def gate_rig(**knobs: Any) -> Rig:
    """Blocks in plenty, so that only adapters are scarce."""
    return make_rig(**({"num_blocks": 2000} | knobs))


def runs(rig: Rig, sequence_id: SequenceId) -> bool:
    sequence = rig.scheduler.get(sequence_id)
    return sequence is not None and sequence.status is SequenceStatus.RUNNING


def add(rig: Rig, ref: AdapterRef | None, max_tokens: int = 8, tenant: str = "") -> SequenceId:
    return rig.add(PROMPT, adapter=ref, max_tokens=max_tokens, tenant=tenant)


def let_pass(rig: Rig, seconds: float) -> None:
    for _ in range(round(seconds / rig.step_s)):
        rig.step()


def assert_all_as_expected(rig: Rig) -> None:
    for sequence_id in rig.added:
        assert rig.tokens(sequence_id) == rig.expected(sequence_id)
    rig.assert_all_free()


# -- room ----------------------------------------------------------------------------------------------


def test_a_sequence_that_waits_only_for_its_adapter_is_passed_by_others() -> None:
    rig = gate_rig(arena_bytes=10)
    first, second, third, fourth = add(rig, ANT), add(rig, BEE), add(rig, None), add(rig, ANT)
    output = rig.step()
    assert [runs(rig, one) for one in (first, second, third, fourth)] == [True, False, True, True]
    assert output is not None
    assert output.stats.waiting_by == ((WaitReason.ADAPTER, 1),)
    assert output.stats.adapters_resident == output.stats.adapters_running == (ANT,)
    assert output.stats.adapters_waiting == (BEE,)
    rig.run()
    assert_all_as_expected(rig)


def both(one: AdapterRef, other: AdapterRef) -> AdapterUse:
    return AdapterUse.sum_of((AdapterPart(one, 0.5), AdapterPart(other, 2.0)))


def test_a_sequence_with_several_adapters_runs_when_all_are_there() -> None:
    rig = gate_rig(arena_bytes=20)
    alone = add(rig, CAT, max_tokens=3)
    rig.step()
    several = rig.add(PROMPT, adapter=both(ANT, BEE))
    rig.step()
    assert runs(rig, alone)
    assert not runs(rig, several)
    rig.run()
    assert rig.placement.users(ANT) == rig.placement.users(BEE) == 0
    assert_all_as_expected(rig)


def test_several_adapters_that_never_fit_together_end_their_sequence_with_an_error() -> None:
    rig = gate_rig(arena_bytes=19)
    several = rig.add(PROMPT, adapter=both(ANT, BEE))
    rig.run()
    assert rig.reason(several) is FinishReason.ERROR


def test_a_claim_for_several_adapters_ends_when_its_sequence_has_them_all() -> None:
    rig = gate_rig(arena_bytes=20, adapter_stay_s=0.1)
    for _ in range(2):
        add(rig, CAT, max_tokens=40)
        add(rig, DOG, max_tokens=60)
    rig.step()
    several = rig.add(PROMPT, adapter=both(ANT, BEE), max_tokens=4)
    let_pass(rig, 0.3)
    late = add(rig, CAT, max_tokens=4)
    rig.run()
    assert rig.outputs[several][0].started < rig.outputs[late][0].started
    assert_all_as_expected(rig)


def test_an_adapter_that_can_never_fit_ends_its_sequence_with_an_error() -> None:
    rig = gate_rig(arena_bytes=20, sizes={"ant": 10, "bee": 21})
    whale, other = add(rig, BEE), add(rig, ANT)
    rig.run()
    terminal = rig.finish(whale)
    assert terminal is not None
    assert terminal.finish is FinishReason.ERROR
    assert terminal.error is not None
    assert "adapter memory" in terminal.error
    assert rig.tokens(other) == rig.expected(other)


def test_mixed_adapters_and_base_rows_share_a_batch() -> None:
    rig = gate_rig()
    everybody = [add(rig, ref) for ref in (ANT, None, BEE, CAT, None, ANT)]
    rig.step()
    assert all(runs(rig, one) for one in everybody)
    rig.run()
    assert_all_as_expected(rig)


def test_an_idle_adapter_makes_room_at_once() -> None:
    rig = gate_rig(arena_bytes=10)
    add(rig, ANT)
    rig.run()
    assert runs(rig, add_and_step(rig, BEE))
    rig.run()
    assert_all_as_expected(rig)


def test_room_is_looked_for_once_in_a_step_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = gate_rig(arena_bytes=10, max_num_seqs=4)
    add(rig, ANT, 100)
    rig.step()
    asked: list[list[int]] = []
    has_room = rig.placement.has_room
    monkeypatch.setattr(
        rig.placement, "has_room", lambda sizes, kept: asked.append(sizes) or has_room(sizes, kept)
    )
    for ref in (BEE, CAT, BEE, BEE, CAT):
        add(rig, ref)
    rig.step()
    assert asked == [[10]]


def scattered_rig() -> Rig:
    """| idle ant | bee in use | idle cat |: for a dog, the bee has to move."""
    rig = gate_rig(arena_bytes=30, sizes={"ant": 10, "bee": 10, "cat": 10, "dog": 15})
    for ref, max_tokens in ((ANT, 1), (BEE, 20), (CAT, 1)):
        add(rig, ref, max_tokens)
    rig.step()
    return rig


def test_a_run_that_is_moved_under_a_running_sequence_does_not_change_its_text() -> None:
    rig = scattered_rig()
    add(rig, DOG)
    rig.step()
    assert [(write.ref, write.moved_from) for write in rig.runner.writes[3:]] == [(BEE, 10), (DOG, None)]
    rig.run()
    assert_all_as_expected(rig)


# -- who gives way -------------------------------------------------------------------------------------


def test_an_adapter_takes_newcomers_until_it_had_its_stay() -> None:
    rig = gate_rig(arena_bytes=10)
    add(rig, ANT, 500)
    waiting = add(rig, BEE)
    let_pass(rig, 1.9)
    newcomer = add(rig, ANT, 2)
    rig.step()
    assert runs(rig, newcomer)
    assert not runs(rig, waiting)


def test_after_its_stay_an_adapter_takes_nobody_until_it_has_made_room() -> None:
    rig = gate_rig(arena_bytes=10)
    user = add(rig, ANT, 230)
    waiting = add(rig, BEE)
    let_pass(rig, 2.1)
    newcomer = add(rig, ANT)
    while runs(rig, user):
        rig.step()
        assert not runs(rig, newcomer)
    rig.step()
    assert runs(rig, waiting)
    rig.run()
    assert_all_as_expected(rig)


def test_the_adapter_with_the_fewest_users_is_closed_and_the_other_stays_open() -> None:
    rig = gate_rig(arena_bytes=20)
    for ref in (ANT, ANT, BEE):
        add(rig, ref, 300)
    add(rig, CAT)
    let_pass(rig, 2.1)
    with_ant, with_bee = add(rig, ANT, 2), add(rig, BEE, 2)
    rig.step()
    assert runs(rig, with_ant)
    assert not runs(rig, with_bee)
    rig.run()
    assert_all_as_expected(rig)


def test_of_equally_popular_adapters_the_one_with_least_work_left_is_closed() -> None:
    rig = gate_rig(arena_bytes=20)
    add(rig, ANT, 300)
    add(rig, BEE, 290)
    add(rig, CAT)
    let_pass(rig, 2.1)
    with_ant, with_bee = add(rig, ANT, 2), add(rig, BEE, 2)
    rig.step()
    assert runs(rig, with_ant)
    assert not runs(rig, with_bee)


def test_one_adapter_after_another_is_closed_for_a_large_one() -> None:
    rig = gate_rig(arena_bytes=20, sizes={"ant": 10, "bee": 10, "cat": 20})
    small = [add(rig, ANT, 250), add(rig, BEE, 300)]
    large = add(rig, CAT)
    let_pass(rig, 2.6)
    assert [runs(rig, one) for one in small] == [False, True]
    late = [add(rig, ANT, 2), add(rig, BEE, 2)]
    while not runs(rig, large):
        rig.step()
        assert not any(runs(rig, one) for one in late)
    rig.run()
    assert_all_as_expected(rig)


def test_room_that_is_made_for_one_adapter_is_not_taken_by_another() -> None:
    rig = gate_rig(arena_bytes=20, sizes={"ant": 10, "bee": 10, "cat": 20, "dog": 10})
    add(rig, ANT, 250)
    add(rig, BEE, 300)
    large = add(rig, CAT)
    let_pass(rig, 2.6)  # the ant's room is free, the bee still runs
    small = add(rig, DOG)
    while not runs(rig, large):
        rig.step()
        assert not runs(rig, small)
    rig.run()
    assert_all_as_expected(rig)


def test_one_more_sequence_with_the_same_revision_settles_the_claim() -> None:
    rig = gate_rig(arena_bytes=10, max_num_seqs=3)
    add(rig, BEE, 230)
    waiting, other = add(rig, ANT), add(rig, ALIAS)
    rig.run()
    assert rig.finish(waiting) is not None
    assert rig.finish(other) is not None
    assert_all_as_expected(rig)


def test_an_adapter_is_not_closed_before_it_had_its_stay_however_long_others_have_waited() -> None:
    rig = gate_rig(arena_bytes=10)
    user = add(rig, ANT, 150)
    first, second = add(rig, BEE, 400), add(rig, CAT)
    while not runs(rig, first):
        rig.step()
    assert rig.finish(user) is not None
    let_pass(rig, 1.0)  # the cat has waited for long, but the bee has just come
    assert runs(rig, add_and_step(rig, BEE))
    let_pass(rig, 1.1)
    assert not runs(rig, add_and_step(rig, BEE))
    rig.run()
    assert rig.tokens(second) == rig.expected(second)
    assert_all_as_expected(rig)


def add_and_step(rig: Rig, ref: AdapterRef, tenant: str = "") -> SequenceId:
    sequence_id = add(rig, ref, 2, tenant)
    rig.step()
    return sequence_id


@pytest.mark.parametrize("how", ["end", "pause"])
def test_when_the_one_who_waited_gives_up_the_closed_adapter_opens_again(how: str) -> None:
    rig = gate_rig(arena_bytes=10)
    add(rig, ANT, 300)
    waiting = add(rig, BEE)
    let_pass(rig, 2.1)
    newcomer = add(rig, ANT)
    rig.step()
    assert not runs(rig, newcomer)
    getattr(rig, how)(waiting)
    rig.step()
    assert runs(rig, newcomer)


def test_a_full_batch_does_not_keep_others_from_their_turn() -> None:
    rig = gate_rig(arena_bytes=10, max_num_seqs=1)
    add(rig, ANT, 10)
    waiting = add(rig, BEE)
    for _ in range(60):
        add(rig, ANT, 10)
    steps = 0
    while not runs(rig, waiting):
        rig.step()
        steps += 1
    assert steps * rig.step_s < 2.5
    rig.run()
    assert_all_as_expected(rig)


@pytest.mark.parametrize(("seed", "num_resident"), [(seed, 1 + seed % 3) for seed in range(6)])
def test_nobody_starves_under_constant_load_with_more_adapters_than_fit(seed: int, num_resident: int) -> None:
    """Twenty seconds in which two popular adapters never stop coming and six others ask now and then."""
    random = Random(seed)
    uses = [AdapterUse.of(ANT), AdapterUse.of(BEE)]
    popular, rare = [ANT, BEE], [adapter(f"rare-{number}") for number in range(6)]
    rig = gate_rig(arena_bytes=10 * num_resident, num_blocks=100, max_num_seqs=6, adapter_stay_s=0.2)
    longest_wait, living = 0.0, list[SequenceId]()
    for _ in range(2000):
        living = [one for one in living if rig.finish(one) is None]
        sequences = [rig.scheduler.get(one) for one in living]
        waiting = [one for one in sequences if one is not None and one.status is SequenceStatus.WAITING]
        longest_wait = max([longest_wait, *(rig.clock() - one.arrival for one in waiting)])
        if sum(one.adapter in uses for one in waiting) < 4:
            living.append(add(rig, random.choice(popular), random.randint(5, 30)))
        if random.random() < 0.02:
            living.append(add(rig, random.choice(rare), random.randint(1, 30)))
        rig.step()
    rig.run(max_steps=20_000)
    assert longest_wait < 10.0
    assert_all_as_expected(rig)


def test_the_adapter_whose_users_were_served_most_is_closed() -> None:
    """Although the other one has fewer users and less to do."""
    rig = gate_rig(arena_bytes=20)
    for _ in range(3):
        add(rig, ANT, 300, "ant")
    add(rig, BEE, 250, "bee")
    let_pass(rig, 1.0)
    add(rig, CAT, 8, "cat")
    let_pass(rig, 1.1)
    with_ant, with_bee = add(rig, ANT, 2, "ant"), add(rig, BEE, 2, "bee")
    rig.step()
    assert runs(rig, with_bee)
    assert not runs(rig, with_ant)


def test_an_adapter_with_a_user_that_was_served_less_than_who_wants_room_stays_open() -> None:
    rig = gate_rig(arena_bytes=10, adapter_stay_s=0.05)
    modest = add(rig, ANT, 60, "modest")
    for _ in range(2):
        add(rig, None, 300, "greedy")
    let_pass(rig, 0.3)
    wants_room = add(rig, BEE, 4, "greedy")
    let_pass(rig, 0.1)
    newcomer = add(rig, ANT, 2, "greedy")
    rig.step()
    assert runs(rig, newcomer)
    while rig.finish(modest) is None:
        rig.step()
    rig.step()
    assert runs(rig, wants_room)


def test_a_closed_adapter_lets_in_who_was_served_less_than_the_one_it_is_closed_for() -> None:
    rig = gate_rig(arena_bytes=10, adapter_stay_s=0.1)
    poor = add(rig, ANT, 4, "poor")
    rig.pause(poor)
    add(rig, ANT, 100, "rich")
    let_pass(rig, 0.2)
    wants_room = add(rig, BEE, 4, "middle")
    rig.step()
    late = add(rig, ANT, 4, "rich")
    rig.scheduler._queue._accounts["middle"].served = 30.0
    rig.resume(poor)
    rig.scheduler._queue._accounts["poor"].served = 0.0
    rig.step()
    assert runs(rig, poor)
    assert not runs(rig, late)
    rig.run()
    assert rig.outputs[wants_room][0].started < rig.outputs[late][0].started
    assert_all_as_expected(rig)


# -- pins ----------------------------------------------------------------------------------------------


def test_pins_are_placed_without_any_request() -> None:
    rig = gate_rig(arena_bytes=40)
    rig.pin(ANT, BEE)
    assert rig.core.has_work
    rig.step()
    assert set(rig.placement.resident()) == {ANT, BEE}
    assert set(rig.runner.runs) == {ANT.revision, BEE.revision}
    assert not rig.core.has_work


def test_pins_are_never_evicted_until_they_are_pins_no_more() -> None:
    rig = gate_rig(arena_bytes=20)
    rig.pin(ANT)
    for ref in (BEE, CAT, DOG):
        add(rig, ref)
        rig.run()
        assert rig.placement.is_resident(ANT)
    rig.pin()
    for ref in (BEE, CAT):
        add(rig, ref)
        rig.run()
    assert not rig.placement.is_resident(ANT)
    assert_all_as_expected(rig)


def test_pins_get_the_next_room_before_those_who_wait() -> None:
    rig = gate_rig(arena_bytes=20)
    users = [add(rig, ANT, 20), add(rig, BEE, 40)]
    rig.step()
    waiting = add(rig, CAT, 4)
    rig.pin(DOG)
    while rig.finish(users[0]) is None:
        rig.step()
    rig.step()
    assert rig.placement.is_resident(DOG)
    assert not runs(rig, waiting)
    rig.run()
    assert rig.placement.is_resident(DOG)
    assert_all_as_expected(rig)


def test_pins_hold_half_of_the_arena_at_most(caplog: pytest.LogCaptureFixture) -> None:
    rig = gate_rig(arena_bytes=40)
    rig.pin(ANT, BEE, CAT)
    rig.step()
    assert set(rig.placement.resident()) == {ANT, BEE}
    assert "adapter cat is not pinned" in caplog.text
    large = rig.add(PROMPT, adapter=both(CAT, DOG))
    rig.run()
    assert rig.tokens(large) == rig.expected(large)


def test_what_does_not_fit_beside_the_pins_ends_with_an_error_instead_of_waiting_for_ever() -> None:
    rig = gate_rig(arena_bytes=40, sizes={"ant": 20, "bee": 21})
    rig.pin(ANT)
    whale, other = add(rig, BEE), add(rig, ANT)
    rig.run()
    assert rig.reason(whale) is FinishReason.ERROR
    assert rig.tokens(other) == rig.expected(other)


def test_pins_that_are_too_many_are_the_same_ones_each_time() -> None:
    assert Pins.of(frozenset({CAT, ANT, BEE})) == Pins((ANT, BEE, CAT))


def test_a_pin_whose_host_copy_has_gone_is_no_pin() -> None:
    rig = gate_rig(sizes={"ant": 10})
    rig.pin(BEE, ANT)
    rig.step()
    assert rig.placement.resident() == (ANT,)


# -- forgotten adapters --------------------------------------------------------------------------------


def test_the_room_of_a_forgotten_adapter_is_free_after_one_step_without_sequences() -> None:
    rig = gate_rig()
    add(rig, ANT)
    rig.run()
    assert rig.placement.resident() == (ANT,)
    rig.forget(ANT)
    assert rig.core.has_work
    rig.step()
    assert rig.placement.resident() == ()
    assert not rig.runner.runs
    rig.assert_all_free()


def test_an_adapter_in_use_is_not_forgotten() -> None:
    rig = gate_rig()
    one = add(rig, ANT)
    rig.step()
    rig.forget(ANT)
    rig.run()
    assert rig.tokens(one) == rig.expected(one)


def test_a_forgotten_pin_holds_no_room() -> None:
    rig = gate_rig()
    rig.pin(ANT)
    rig.step()
    rig.forget(ANT)
    rig.run()
    assert rig.placement.resident() == ()


def test_forgetting_what_never_came_is_nothing() -> None:
    rig = gate_rig()
    rig.forget(CAT)
    assert not rig.core.has_work


def test_a_pin_whose_host_copy_goes_as_it_is_being_placed_costs_the_step_nothing() -> None:
    rig = gate_rig(arena_bytes=20)
    one = add(rig, ANT, 20)
    rig.step()
    rig.runner.lost = {BEE.revision}
    rig.pin(BEE)
    rig.step()
    rig.step()
    assert runs(rig, one)
    assert rig.placement.resident() == (ANT,)
    rig.runner.lost.clear()
    late = add(rig, BEE)
    rig.run()
    assert rig.tokens(late) == rig.expected(late)
    assert_all_as_expected(rig)


# -- prefetches ----------------------------------------------------------------------------------------


def test_an_adapter_comes_beside_a_running_step_and_its_sequence_enters_with_the_next() -> None:
    rig = gate_rig(prefetches=True)
    add(rig, ANT, 20)
    rig.step()
    newcomer = add(rig, BEE)
    rig.step()
    assert not runs(rig, newcomer)
    assert [write.ref for write in rig.runner.prefetches] == [BEE]
    rig.step()
    assert runs(rig, newcomer)
    assert [write.ref for write in rig.runner.writes] == [ANT, BEE]  # the second time when it had come
    rig.run()
    assert_all_as_expected(rig)


def test_with_nothing_running_an_adapter_is_written_in_the_step_that_uses_it() -> None:
    rig = gate_rig(prefetches=True)
    one = add(rig, ANT)
    rig.step()
    assert runs(rig, one)
    assert not rig.runner.prefetches


def test_without_room_in_the_batch_the_adapters_of_those_who_are_next_come_all_the_same() -> None:
    rig = gate_rig(prefetches=True, max_num_seqs=1, arena_bytes=20)
    add(rig, ANT, 20)
    rig.step()
    waiting = [add(rig, BEE, 2), add(rig, CAT, 2)]
    rig.step()
    assert rig.placement.resident() == (ANT, BEE)  # there is no room for the cat's: the bee comes sooner
    for _ in range(5):
        rig.step()
    assert [write.ref for write in rig.runner.prefetches] == [BEE]
    rig.run()
    assert rig.outputs[waiting[0]][0].started < rig.outputs[waiting[1]][0].started
    assert_all_as_expected(rig)


def test_a_prefetch_takes_the_room_of_idle_adapters_that_nobody_waits_for() -> None:
    rig = gate_rig(prefetches=True, max_num_seqs=1, arena_bytes=30)
    for ref in (ANT, BEE):
        add(rig, ref, 2)
        rig.run()
    add(rig, CAT, 20)
    rig.step()  # the ant's and the bee's lie idle
    waiting = [add(rig, ANT, 2), add(rig, DOG, 2)]
    rig.step()
    assert set(rig.placement.resident()) == {ANT, CAT, DOG}
    rig.run()
    assert all(rig.tokens(one) == rig.expected(one) for one in waiting)


@pytest.mark.parametrize("prefetches", [False, True])
def test_a_move_and_a_prefetch_in_one_step_do_not_meet(prefetches: bool) -> None:
    rig = gate_rig(arena_bytes=30, sizes={"ant": 10, "bee": 10, "cat": 10, "dog": 15}, prefetches=prefetches)
    for ref, max_tokens in ((ANT, 1), (BEE, 20), (CAT, 1)):
        add(rig, ref, max_tokens)
        rig.step()
    rig.step()
    add(rig, DOG)
    before = len(rig.runner.writes)
    rig.step()
    assert [(write.ref, write.moved_from) for write in rig.runner.writes[before:]] == [(BEE, 10), (DOG, None)]
    assert [write.ref for write in rig.runner.prefetches] == [CAT, DOG] * prefetches
    rig.run()
    assert_all_as_expected(rig)


def test_an_adapter_whose_prefetch_failed_is_written_in_the_step_that_uses_it() -> None:
    rig = gate_rig(prefetches=True)
    first = add(rig, ANT, 20)
    rig.step()
    rig.runner.interrupt = Breaker("prefetch")
    newcomer = add(rig, BEE)
    rig.step()
    assert rig.reason(first) is FinishReason.ERROR
    other = add(rig, None, 20)
    rig.step()
    assert runs(rig, newcomer)
    rig.run()
    for one in (newcomer, other):
        assert rig.tokens(one) == rig.expected(one)
    assert len(rig.runner.prefetches) == 0


# -- failed steps --------------------------------------------------------------------------------------


class Breaker:
    """Interrupts the runner once: when it comes to a point for the n-th time."""

    def __init__(self, point: str, visit: int = 1) -> None:
        self.point = point
        self.visits_left = visit

    def __call__(self, point: str) -> None:
        if point == self.point:
            self.visits_left -= 1
            if self.visits_left == 0:
                raise RuntimeError(point)


@pytest.mark.parametrize("point", ["start", "write", "end"])
def test_an_adapter_whose_write_is_in_doubt_is_written_again_before_its_next_use(point: str) -> None:
    rig = gate_rig(interrupt=Breaker(point))
    lost = add(rig, ANT)
    rig.step()
    assert rig.reason(lost) is FinishReason.ERROR
    again = add(rig, ANT)
    before = len(rig.runner.writes)
    rig.run()
    assert rig.tokens(again) == rig.expected(again)
    assert len(rig.runner.writes) == before + 1


def test_an_adapter_that_cannot_be_written_fails_only_its_own_sequences() -> None:
    rig = gate_rig()
    rig.runner.interrupt = Breaker("write")
    lost = add(rig, ANT)
    rig.step()
    rig.runner.interrupt = Breaker("write", visit=2)
    others = [add(rig, None), add(rig, BEE)]  # one write; would be two with the ant's
    rig.run()
    assert rig.reason(lost) is FinishReason.ERROR
    for sequence_id in others:
        assert rig.tokens(sequence_id) == rig.expected(sequence_id)


@pytest.mark.parametrize(
    "breaker",
    [Breaker("start"), Breaker("write", 1), Breaker("write", 2), Breaker("end")],
    ids=["before everything", "before the move", "after the move", "after everything"],
)
def test_moves_and_evictions_in_doubt_do_no_harm(breaker: Breaker) -> None:
    rig = gate_rig(arena_bytes=30, sizes={"ant": 10, "bee": 10, "cat": 10, "dog": 15})
    add(rig, ANT)
    add(rig, BEE)
    rig.run()
    rig.runner.interrupt = breaker
    lost = add(rig, DOG)  # | idle ant | idle bee | free | becomes | bee | dog |
    rig.step()
    assert rig.reason(lost) is FinishReason.ERROR
    for ref in (BEE, DOG, ANT, CAT, DOG, BEE):
        add(rig, ref)
        rig.run()
    for sequence_id in rig.added:
        if sequence_id != lost:
            assert rig.tokens(sequence_id) == rig.expected(sequence_id)
    rig.assert_all_free()


def test_a_run_in_doubt_that_is_moved_again_is_written_where_it_belongs_by_then() -> None:
    rig = gate_rig(arena_bytes=40, sizes={"ant": 10, "bee": 10, "cat": 10, "dog": 25})
    for ref in (ANT, CAT):
        add(rig, ref)
        rig.run()
    rig.runner.interrupt = Breaker("write")
    lost = add(rig, BEE)
    rig.step()
    later = [add(rig, DOG)]  # | idle ant | idle cat | bee in doubt | free | becomes | bee | dog |
    rig.run()
    assert rig.placement.is_resident(BEE)
    later += [add(rig, BEE), add(rig, DOG)]
    rig.run()
    assert rig.reason(lost) is FinishReason.ERROR
    for sequence_id in later:
        assert rig.tokens(sequence_id) == rig.expected(sequence_id)
