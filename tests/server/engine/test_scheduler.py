"""What is computed when, seen through a core on fakes: small stories, told by the chunks of each step."""

from collections import Counter

import pytest

from server.engine.sequence import SequenceId, SequenceStatus, WaitReason
from server.types import FinishReason
from tests.fakes import Rig, adapter, make_rig

ANT, BEE, CAT, DOG = (adapter(name) for name in ("ant", "bee", "cat", "dog"))


def text(length: int, start: int = 1) -> list[int]:
    """A prompt of so many tokens, unlike that of any other start."""
    return [(start * 31 + i * i) % 97 for i in range(length)]


def chunks(rig: Rig) -> dict[SequenceId, tuple[int, int]]:
    """Start and number of tokens of each chunk of the last forward pass."""
    return rig.runner.log[-1]


def why(rig: Rig, sequence_id: SequenceId) -> WaitReason:
    sequence = rig.sequence(sequence_id)
    assert sequence.status is SequenceStatus.WAITING
    return rig.scheduler.wait_reason(sequence)


def runs(rig: Rig, sequence_id: SequenceId) -> bool:
    return rig.sequence(sequence_id).status is SequenceStatus.RUNNING


def assert_all_as_expected(rig: Rig) -> None:
    for sequence_id in rig.added:
        assert rig.tokens(sequence_id) == rig.expected(sequence_id)
    rig.assert_all_free()


# -- budget and chunks ---------------------------------------------------------------------------------


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    rig = make_rig(max_num_batched_tokens=5)
    one = rig.add(text(12), max_tokens=2)
    rig.run()
    assert rig.runner.log == [{one: (0, 5)}, {one: (5, 5)}, {one: (10, 2)}, {one: (12, 1)}]
    assert_all_as_expected(rig)


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 16, 64])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_chunked_gives_the_same_text_as_whole(budget: int, block_size: int) -> None:
    rig = make_rig(max_num_batched_tokens=budget, block_size=block_size, num_blocks=400 // block_size)
    for number, ref in enumerate([None, ANT, None, BEE]):
        rig.add(text(11 + 5 * number, number), adapter=ref)
    rig.run()
    assert_all_as_expected(rig)


def test_running_sequences_get_their_token_before_anybodys_prompt_gets_more() -> None:
    rig = make_rig(max_num_batched_tokens=6)
    old = rig.add(text(10), max_tokens=9)
    rig.step()
    rig.step()  # the old one's prompt is computed: two tokens of the budget were left
    young = rig.add(text(20, 2), max_tokens=9)
    rig.step()
    assert chunks(rig) == {old: (10, 1), young: (0, 5)}
    rig.step()
    assert chunks(rig) == {old: (11, 1), young: (5, 5)}


def test_a_young_sequences_token_comes_before_an_old_ones_prompt() -> None:
    rig = make_rig(max_num_batched_tokens=6)
    old = rig.add(text(30))
    rig.pause(old)
    young = rig.add(text(3, 2), max_tokens=20)
    rig.step()
    rig.resume(old)
    rig.step()
    assert chunks(rig) == {young: (3, 1), old: (0, 5)}
    rig.step()
    assert chunks(rig) == {old: (5, 5), young: (4, 1)}


def test_with_a_budget_below_the_batch_the_oldest_go_first_and_nobody_is_forgotten() -> None:
    rig = make_rig(max_num_batched_tokens=2)
    one, two, three = (rig.add(text(1, number), max_tokens=3) for number in range(3))
    rig.step()
    assert chunks(rig) == {one: (0, 1), two: (0, 1)}
    rig.step()
    assert chunks(rig) == {one: (1, 1), two: (1, 1)}
    assert why(rig, three) is WaitReason.CAPACITY
    rig.run()
    assert_all_as_expected(rig)


def test_no_more_sequences_run_than_there_are_seats() -> None:
    rig = make_rig(max_num_seqs=2)
    one, two, three = (rig.add(text(3, number), max_tokens=2 + number) for number in range(3))
    rig.step()
    assert set(chunks(rig)) == {one, two}
    assert why(rig, three) is WaitReason.CAPACITY
    rig.run()
    assert_all_as_expected(rig)


@pytest.mark.parametrize("together", [1, 2, 5, 8])
def test_batched_gives_the_same_text_as_alone(together: int) -> None:
    rig = make_rig(max_num_seqs=together)
    for number in range(8):
        rig.add(text(5 + number, number), adapter=[None, ANT, BEE][number % 3], max_tokens=6)
    rig.run()
    assert_all_as_expected(rig)


# -- prefix cache --------------------------------------------------------------------------------------


def test_a_known_beginning_is_not_computed_again() -> None:
    rig = make_rig(block_size=4)
    rig.add(text(10), max_tokens=1)
    rig.run()
    again = rig.add(text(10), max_tokens=3)
    rig.step()
    assert chunks(rig) == {again: (8, 2)}
    rig.run()
    terminal = rig.finish(again)
    assert terminal is not None
    assert terminal.num_cached == 8
    assert_all_as_expected(rig)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_cached_gives_the_same_text_as_cold(enable_prefix_caching: bool) -> None:
    rig = make_rig(enable_prefix_caching=enable_prefix_caching)
    for ref in (None, ANT, None, ANT, BEE):
        rig.add(text(18), adapter=ref, max_tokens=12)
        rig.run()
    cached = [rig.outputs[sequence_id][-1].num_cached for sequence_id in rig.added]
    assert cached == ([0, 0, 16, 16, 0] if enable_prefix_caching else [0, 0, 0, 0, 0])
    assert_all_as_expected(rig)


def test_a_next_turn_finds_the_answer_of_the_last_one() -> None:
    rig = make_rig(block_size=4)
    first = rig.add(text(6), max_tokens=10)
    rig.run()
    second = rig.add([*text(6), *rig.tokens(first), 5, 5], max_tokens=2)
    rig.step()
    assert chunks(rig)[second][0] == 12  # of 16; the last generated token was never computed
    rig.run()
    assert_all_as_expected(rig)


def test_n_sequences_of_one_prompt_that_start_together_compute_it_side_by_side() -> None:
    rig = make_rig()
    for _ in range(3):
        rig.add(text(10), max_tokens=4)
    rig.run()
    assert rig.runner.log[0] == {1: (0, 10), 2: (0, 10), 3: (0, 10)}
    assert_all_as_expected(rig)


def test_a_sequence_shares_the_blocks_of_one_that_still_runs() -> None:
    rig = make_rig(block_size=4, num_blocks=8)
    one = rig.add(text(13), max_tokens=6)
    rig.step()
    two = rig.add(text(13), max_tokens=6)
    rig.step()
    assert rig.sequence(one).block_table[:3] == rig.sequence(two).block_table[:3]
    rig.end(one)
    rig.run()
    assert rig.tokens(two) == rig.expected(two)
    rig.assert_all_free()


def test_prefix_hits_are_counted_once_also_after_a_preemption() -> None:
    rig = make_rig(block_size=2, num_blocks=12)
    rig.add(text(6), max_tokens=1)
    rig.run()
    counts: Counter[str] = Counter()
    rig.add(text(6), max_tokens=14)
    rig.add([*text(4), 9, 9], max_tokens=14)
    while (output := rig.step()) is not None:
        counts["queries"] += output.stats.prefix_queries
        counts["hits"] += output.stats.prefix_hits
        counts["preemptions"] += output.stats.preemptions
    assert counts["preemptions"] > 0
    assert (counts["queries"], counts["hits"]) == (12, 8)
    assert [rig.outputs[sequence_id][-1].num_cached for sequence_id in rig.added] == [0, 4, 4]
    assert_all_as_expected(rig)


def test_without_prefix_caching_no_queries_are_counted() -> None:
    rig = make_rig(enable_prefix_caching=False)
    rig.add(text(6))
    output = rig.step()
    assert output is not None
    assert output.stats.prefix_queries == 0


# -- blocks --------------------------------------------------------------------------------------------


def test_when_blocks_are_short_the_youngest_returns_to_its_place_in_the_queue() -> None:
    rig = make_rig(block_size=2, num_blocks=8, max_num_seqs=2)
    old = rig.add(text(5), max_tokens=8)
    young = rig.add(text(5, 2), max_tokens=8)
    later = rig.add(text(1, 3), max_tokens=1)
    while rig.last is None or rig.last.stats.preemptions == 0:
        rig.step()
    assert runs(rig, old)
    assert why(rig, young) is WaitReason.BLOCKS
    assert why(rig, later) is WaitReason.BLOCKS  # small as it is, it does not pass
    rig.run()
    assert_all_as_expected(rig)


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    rig = make_rig(block_size=2, num_blocks=9)
    old = rig.add(text(5), max_tokens=9)
    young = rig.add(text(5, 2), max_tokens=9)
    while rig.last is None or rig.last.stats.preemptions == 0:
        rig.step()
    assert young not in chunks(rig)
    while rig.finish(old) is None:
        rig.step()
    rig.step()
    start, _ = chunks(rig)[young]
    assert start > 0
    rig.run()
    assert_all_as_expected(rig)


@pytest.mark.parametrize("num_blocks", [6, 8, 11, 17])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_preempted_sequences_give_the_same_text(num_blocks: int, enable_prefix_caching: bool) -> None:
    rig = make_rig(block_size=4, num_blocks=num_blocks, enable_prefix_caching=enable_prefix_caching)
    for number in range(6):
        rig.add(text(3 + number % 2, number), adapter=[None, ANT][number % 2], max_tokens=18)
    preemptions = 0
    while (output := rig.step()) is not None:
        preemptions += output.stats.preemptions
    assert preemptions > 0
    assert_all_as_expected(rig)


def test_nobody_is_admitted_by_taking_from_running_sequences() -> None:
    rig = make_rig(block_size=4, num_blocks=6)
    old = rig.add(text(15), max_tokens=4)
    rig.step()
    waiting = rig.add(text(9, 2))
    while rig.finish(old) is None:
        output = rig.step()
        assert output is not None
        assert output.stats.preemptions == 0
        assert rig.finish(old) is not None or why(rig, waiting) is WaitReason.BLOCKS
    rig.run()
    assert_all_as_expected(rig)


def test_a_large_sequence_is_not_starved_by_small_ones() -> None:
    rig = make_rig(block_size=4, num_blocks=10)
    rig.add(text(12), max_tokens=4)
    large = rig.add(text(33, 2), max_tokens=2)
    finished_when_large_started = None
    for number in range(40):
        rig.add(text(2, number), max_tokens=3)
        rig.step()
        if finished_when_large_started is None and runs(rig, large):
            finished_when_large_started = sum(rig.finish(one) is not None for one in rig.added)
            break
    assert finished_when_large_started == 1  # those before it, nobody behind it
    rig.run()
    assert_all_as_expected(rig)


def test_admission_leaves_running_sequences_a_block_to_grow_into() -> None:
    rig = make_rig(block_size=4, num_blocks=5)
    rig.add(text(5), max_tokens=4)
    rig.step()
    young = rig.add(text(12, 2), max_tokens=1)  # three blocks are free and would be just enough
    rig.step()
    assert why(rig, young) is WaitReason.BLOCKS
    rig.run()
    assert_all_as_expected(rig)


def test_a_prompt_that_fits_into_no_pool_ends_with_an_error_and_nobody_else_notices() -> None:
    rig = make_rig(block_size=4, num_blocks=4)
    too_long = rig.add(text(17))
    other = rig.add(text(5))
    rig.run()
    terminal = rig.finish(too_long)
    assert terminal is not None
    assert terminal.finish is FinishReason.ERROR
    assert terminal.error is not None
    assert "KV memory" in terminal.error
    assert rig.tokens(other) == rig.expected(other)


def test_a_text_that_outgrows_the_pool_ends_with_an_error_when_it_is_alone() -> None:
    rig = make_rig(block_size=4, num_blocks=4)
    growing = rig.add(text(10), max_tokens=100)
    rig.run()
    assert rig.reason(growing) is FinishReason.ERROR
    assert rig.tokens(growing) == rig.expected(growing)[:7]  # 16 positions hold 10 + 6; the 7th needs none
    rig.assert_all_free()


def test_two_texts_that_outgrow_the_pool_do_not_push_each_other_out_for_ever() -> None:
    rig = make_rig(block_size=4, num_blocks=4)
    rig.add(text(3), max_tokens=100)
    rig.add(text(3, 2), max_tokens=100)
    rig.run(max_steps=100)
    assert [rig.reason(one) for one in rig.added] == [FinishReason.ERROR] * 2
    rig.assert_all_free()


# -- readers who do not read ---------------------------------------------------------------------------


def test_a_paused_sequence_gets_no_forward_passes_and_goes_on_where_it_was() -> None:
    rig = make_rig()
    one = rig.add(text(5), max_tokens=6)
    rig.step()
    rig.pause(one)
    output = rig.step()
    assert output is not None
    assert (output.stats.running, output.stats.waiting_by) == (0, ((WaitReason.READER, 1),))
    assert rig.step() is None
    rig.resume(one)
    rig.step()
    assert chunks(rig) == {one: (5, 1)}
    rig.run()
    assert_all_as_expected(rig)


def test_a_paused_sequences_blocks_are_taken_before_anybody_is_preempted() -> None:
    rig = make_rig(block_size=2, num_blocks=8, enable_prefix_caching=False)
    sleeper = rig.add(text(7), max_tokens=3)
    rig.step()
    rig.pause(sleeper)
    other = rig.add(text(5, 2), max_tokens=8)
    while rig.finish(other) is None:
        output = rig.step()
        assert output is not None
        assert output.stats.preemptions == 0
    assert rig.sequence(sleeper).block_table == []
    rig.resume(sleeper)
    rig.step()
    assert chunks(rig) == {sleeper: (0, 8)}
    rig.run()
    assert_all_as_expected(rig)


def test_what_is_computed_once_more_is_counted_as_prefill() -> None:
    rig = make_rig(block_size=2, num_blocks=6)
    sleeper = rig.add(text(2), max_tokens=9)
    for _ in range(7):
        rig.step()
    rig.pause(sleeper)
    rig.add(text(7, 2), max_tokens=1)  # takes all but the head of the sleeper's text
    rig.step()
    rig.resume(sleeper)
    output = rig.step()
    assert output is not None
    start, num_tokens = chunks(rig)[sleeper]
    assert (start, start + num_tokens) == (4, 9)  # behind the prompt
    assert (output.stats.prefill_tokens, output.stats.decode_tokens) == (5, 0)
    rig.run()
    assert_all_as_expected(rig)


def test_a_newcomer_may_take_a_paused_sequences_blocks() -> None:
    rig = make_rig(block_size=2, num_blocks=4)
    sleeper = rig.add(text(5), max_tokens=3)
    rig.step()
    rig.pause(sleeper)
    rig.add(text(6, 2), max_tokens=1)
    rig.run()
    rig.resume(sleeper)
    rig.run()
    assert_all_as_expected(rig)


def test_sequences_that_wake_up_together_do_not_wait_for_each_others_blocks() -> None:
    rig = make_rig(block_size=2, num_blocks=6)
    pair = [rig.add(text(3, number), max_tokens=9) for number in range(2)]
    rig.step()
    rig.step()
    for one in pair:
        rig.pause(one)
    rig.step()
    for one in pair:
        rig.resume(one)
    rig.run(max_steps=100)
    assert_all_as_expected(rig)


def test_a_sequence_paused_before_its_start_holds_nobody_up() -> None:
    rig = make_rig(max_num_seqs=1)
    first = rig.add(text(5), max_tokens=2)
    rig.pause(first)
    second = rig.add(text(5, 2), max_tokens=2)
    rig.step()
    assert set(chunks(rig)) == {second}
    assert why(rig, first) is WaitReason.READER
    rig.resume(first)
    rig.run()
    assert_all_as_expected(rig)


def test_pausing_lets_go_of_the_adapter() -> None:
    rig = make_rig(arena_bytes=10)
    sleeper = rig.add(text(5), adapter=ANT, max_tokens=5)
    rig.step()
    rig.pause(sleeper)
    other = rig.add(text(5), adapter=BEE, max_tokens=2)
    rig.run()
    assert rig.tokens(other) == rig.expected(other)
    rig.resume(sleeper)
    rig.run()
    assert_all_as_expected(rig)
