"""More adapters than fit: patience, who is closed, what a failed step leaves behind; nobody starves."""

from random import Random
from typing import Any

import pytest

from adapters.types import AdapterRef
from server.engine.sequence import SequenceId, SequenceStatus
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


def add(rig: Rig, ref: AdapterRef | None, max_tokens: int = 8) -> SequenceId:
    return rig.add(PROMPT, adapter=ref, max_tokens=max_tokens)


def let_pass(rig: Rig, seconds: float) -> None:
    for _ in range(round(seconds / rig.step_s)):
        rig.step()


def assert_all_as_expected(rig: Rig) -> None:
    for sequence_id in rig.added:
        assert rig.tokens(sequence_id) == rig.expected(sequence_id)
    rig.assert_all_free()


# -- patience ------------------------------------------------------------------------------------------


def test_before_patience_ends_the_resident_adapter_takes_newcomers() -> None:
    rig = gate_rig(arena_bytes=10)
    add(rig, ANT, 500)
    waiting = add(rig, BEE)
    let_pass(rig, 1.9)
    newcomer = add(rig, ANT, 2)
    rig.step()
    assert runs(rig, newcomer)
    assert not runs(rig, waiting)


def test_after_patience_the_resident_adapter_takes_nobody_until_it_has_made_room() -> None:
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


def test_an_adapter_is_not_closed_before_it_has_been_resident_for_the_patience_of_others() -> None:
    rig = gate_rig(arena_bytes=10)
    user = add(rig, ANT, 150)
    first, second = add(rig, BEE, 400), add(rig, CAT)
    while not runs(rig, first):
        rig.step()
    assert rig.finish(user) is not None
    let_pass(rig, 1.0)  # the cat has lost its patience long ago, but the bee has just come
    assert runs(rig, add_and_step(rig, BEE))
    let_pass(rig, 1.1)
    assert not runs(rig, add_and_step(rig, BEE))
    rig.run()
    assert rig.tokens(second) == rig.expected(second)
    assert_all_as_expected(rig)


def add_and_step(rig: Rig, ref: AdapterRef) -> SequenceId:
    sequence_id = add(rig, ref, 2)
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


def test_a_full_batch_does_not_reset_the_patience() -> None:
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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_resident", [1, 2, 3])
def test_nobody_starves_under_constant_load_with_more_adapters_than_fit(seed: int, num_resident: int) -> None:
    """Twenty seconds in which two popular adapters never stop coming and six others ask now and then."""
    random = Random(seed)
    popular, rare = [ANT, BEE], [adapter(f"rare-{number}") for number in range(6)]
    rig = gate_rig(arena_bytes=10 * num_resident, num_blocks=100, max_num_seqs=6, adapter_patience_s=0.2)
    longest_wait = 0.0
    for _ in range(2000):
        living = [rig.scheduler.get(one) for one in rig.added if rig.finish(one) is None]
        waiting = [one for one in living if one is not None and one.status is SequenceStatus.WAITING]
        longest_wait = max([longest_wait, *(rig.clock() - one.arrival for one in waiting)])
        if sum(one.adapter in popular for one in waiting) < 4:
            add(rig, random.choice(popular), random.randint(5, 30))
        if random.random() < 0.02:
            add(rig, random.choice(rare), random.randint(1, 30))
        rig.step()
    rig.run(max_steps=20_000)
    assert longest_wait < 10.0
    assert_all_as_expected(rig)


# -- failed steps --------------------------------------------------------------------------------------


class Broken(Exception):
    pass


class Breaker:
    """Interrupts the runner at given points, each once."""

    def __init__(self, *points: str) -> None:
        self.points = list(points)

    def __call__(self, point: str) -> None:
        if self.points and self.points[0] == point:
            self.points.pop(0)
            raise Broken(point)


@pytest.mark.parametrize("point", ["start", "write", "end"])
def test_an_adapter_whose_write_is_in_doubt_is_written_again_before_its_next_use(point: str) -> None:
    rig = gate_rig(interrupt=Breaker(point))
    lost = add(rig, ANT)
    rig.step()
    assert rig.reason(lost) is FinishReason.ERROR
    again = add(rig, ANT)
    rig.run()
    assert rig.tokens(again) == rig.expected(again)


def test_an_adapter_that_cannot_be_written_fails_only_its_own_sequences() -> None:
    rig = gate_rig()
    rig.runner.interrupt = lambda point: raise_if(point == "write" and len(rig.runner.log) != 3)
    lost = add(rig, ANT)
    rig.step()
    other = add(rig, None, 3)
    rig.step()
    with_bee = add(rig, BEE, 3)  # written in the third pass, the only one in which writing works
    rig.run()
    assert rig.reason(lost) is FinishReason.ERROR
    for sequence_id in (other, with_bee):
        assert rig.tokens(sequence_id) == rig.expected(sequence_id)


def raise_if(condition: bool) -> None:
    if condition:
        raise Broken


def test_a_move_in_doubt_becomes_a_write_and_an_eviction_in_doubt_is_repeated() -> None:
    rig = gate_rig(arena_bytes=30, sizes={"ant": 10, "bee": 10, "cat": 20, "dog": 5})
    add(rig, ANT, 1)
    stays = add(rig, BEE, 20)
    rig.step()  # the ant is idle now
    rig.pause(stays)
    rig.runner.interrupt = Breaker("write")
    lost = add(rig, CAT)  # the ant goes, perhaps the bee's run is moved
    rig.step()
    assert rig.reason(lost) is FinishReason.ERROR
    rig.resume(stays)
    for ref in (DOG, CAT, ANT):
        add(rig, ref, 4)
    rig.run()
    for sequence_id in rig.added:
        if sequence_id != lost:
            assert rig.tokens(sequence_id) == rig.expected(sequence_id)
    rig.assert_all_free()
