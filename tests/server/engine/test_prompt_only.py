"""What the engine tells about prompts, on a device of lists: every token's score once, and vectors."""

import pytest

from server.types import FinishReason, Pooling, SamplingParams
from tests.fakes import adapter, expected_scores, expected_vector, make_rig

SCORED = SamplingParams(num_prompt_logprobs=2)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.mark.parametrize("budget", [1, 2, 5, 64])
def test_each_token_of_a_prompt_but_the_first_is_scored_once(budget: int) -> None:
    rig = make_rig(max_num_batched_tokens=budget)
    one = rig.add(PROMPT, sampling=SCORED, max_tokens=3)
    rig.run()
    assert rig.scores(one) == expected_scores(PROMPT, 2)
    assert [scored.token_id for scored in rig.scores(one)] == PROMPT[1:]
    assert rig.tokens(one) == rig.expected(one)


def test_scores_come_with_the_steps_that_compute_them_and_the_last_ones_with_the_first_token() -> None:
    rig = make_rig(max_num_batched_tokens=4)
    one = rig.add(PROMPT, sampling=SCORED, max_tokens=2)
    rig.run()
    told = [(len(news.scores), news.token is not None) for news in rig.outputs[one]]
    assert told == [(4, False), (4, False), (2, True), (0, True)]


@pytest.mark.parametrize("prompt", [[7], PROMPT])
def test_a_prompt_that_is_only_scored_ends_without_a_token(prompt: list[int]) -> None:
    rig = make_rig(max_num_batched_tokens=4)
    one = rig.add(prompt, sampling=SCORED, max_tokens=0)
    rig.run()
    assert rig.scores(one) == expected_scores(prompt, 2)
    assert rig.tokens(one) == []
    assert rig.reason(one) is FinishReason.LENGTH
    rig.assert_all_free()


def test_a_scored_prompt_does_not_read_the_prefix_cache_but_fills_it() -> None:
    rig = make_rig()
    rig.add(PROMPT, max_tokens=1)
    rig.run()
    scored = rig.add(PROMPT, sampling=SCORED, max_tokens=1)
    rig.run()
    assert rig.scores(scored) == expected_scores(PROMPT, 2)
    assert rig.outputs[scored][-1].num_cached == 0
    assert rig.last is not None
    assert (rig.last.stats.prefix_queries, rig.last.stats.prefix_hits) == (0, 0)
    cold = make_rig()
    cold.add(PROMPT, sampling=SCORED, max_tokens=1)
    cold.run()
    after = cold.add(PROMPT, max_tokens=1)
    cold.run()
    assert cold.outputs[after][-1].num_cached == 8


def test_a_preempted_sequence_does_not_tell_its_prompt_twice() -> None:
    """It is thrown out after its prompt, and then may read what it wrote itself from the prefix cache."""
    rig = make_rig(num_blocks=7, block_size=4)
    old = rig.add([1] * 9, max_tokens=12)
    young = rig.add(PROMPT, sampling=SCORED, max_tokens=8)
    preemptions = 0
    while rig.step() is not None:
        assert rig.last is not None
        preemptions += rig.last.stats.preemptions
    assert preemptions > 0
    assert rig.scores(young) == expected_scores(PROMPT, 2)
    assert rig.tokens(young) == rig.expected(young)
    assert rig.tokens(old) == rig.expected(old)


def test_a_prompt_that_is_thrown_out_half_way_goes_on_telling_where_it_was() -> None:
    rig = make_rig(num_blocks=6, block_size=4, max_num_batched_tokens=4)
    old = rig.add([1] * 6, max_tokens=14)
    rig.step()
    rig.step()
    prompt = PROMPT[:8]
    young = rig.add(prompt, sampling=SCORED, max_tokens=4)
    rig.step()
    assert len(rig.scores(young)) == 3
    rig.pause(young)
    while rig.sequence(young).block_table:
        rig.step()
    rig.resume(young)
    rig.run()
    assert rig.scores(young) == expected_scores(prompt, 2)
    assert rig.tokens(young) == rig.expected(young)
    assert rig.tokens(old) == rig.expected(old)


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("budget", [1, 3, 64])
def test_a_pooled_prompt_ends_with_its_vector(pooling: Pooling, budget: int) -> None:
    rig = make_rig(max_num_batched_tokens=budget)
    generating = rig.add(PROMPT, max_tokens=9)
    pooled = rig.add(PROMPT, adapter=adapter("a"), pooling=pooling, max_tokens=0)
    rig.run()
    assert rig.vector(pooled) == rig.expected_vector(pooled) != expected_vector(PROMPT, pooling)
    assert (rig.tokens(pooled), rig.reason(pooled)) == ([], FinishReason.LENGTH)
    assert len(rig.outputs[pooled]) == 1
    assert rig.tokens(generating) == rig.expected(generating)
    rig.assert_all_free()


@pytest.mark.parametrize(("pooling", "num_cached"), [(Pooling.MEAN, 0), (Pooling.LAST, 8)])
def test_a_mean_needs_every_token_computed_and_the_last_one_does_not(
    pooling: Pooling, num_cached: int
) -> None:
    rig = make_rig()
    rig.add(PROMPT, max_tokens=1)
    rig.run()
    pooled = rig.add(PROMPT, pooling=pooling, max_tokens=0)
    rig.run()
    assert rig.vector(pooled) == expected_vector(PROMPT, pooling)
    assert rig.outputs[pooled][-1].num_cached == num_cached


def test_a_mean_that_lost_its_blocks_begins_anew() -> None:
    rig = make_rig(num_blocks=6, block_size=4, max_num_batched_tokens=4)
    old = rig.add([1] * 6, max_tokens=14)
    rig.step()
    rig.step()
    pooled = rig.add(PROMPT[:8], pooling=Pooling.MEAN, max_tokens=0)
    rig.step()
    assert rig.sequence(pooled).num_computed > 0
    rig.pause(pooled)
    while rig.sequence(pooled).block_table:
        rig.step()
    rig.resume(pooled)
    rig.run()
    assert rig.vector(pooled) == expected_vector(PROMPT[:8], Pooling.MEAN)
    assert rig.tokens(old) == rig.expected(old)


def test_a_prompt_may_fill_the_context_where_nothing_comes_after_it() -> None:
    rig = make_rig(max_model_len=len(PROMPT))
    pooled = rig.add(PROMPT, pooling=Pooling.LAST, max_tokens=0)
    scored = rig.add(PROMPT, sampling=SCORED, max_tokens=0)
    too_long = rig.add([*PROMPT, 1], pooling=Pooling.LAST, max_tokens=0)
    generating = rig.add(PROMPT, max_tokens=1)
    rig.run()
    assert [rig.reason(one) for one in (pooled, scored)] == [FinishReason.LENGTH] * 2
    assert [rig.reason(one) for one in (too_long, generating)] == [FinishReason.ERROR] * 2


@pytest.mark.parametrize("budget", [3, 64])
@pytest.mark.parametrize("question", [{"sampling": SCORED}, {"pooling": Pooling.MEAN}])
def test_a_prompt_whose_numbers_are_bad_fails_alone(budget: int, question: dict[str, object]) -> None:
    rig = make_rig(max_num_batched_tokens=budget)
    bad = rig.add(PROMPT, max_tokens=0, **question)  # type: ignore[arg-type]
    good = rig.add(PROMPT, max_tokens=0, **question)  # type: ignore[arg-type]
    rig.runner.bad_rows.add(bad)
    rig.run()
    assert rig.reason(bad) is FinishReason.ERROR
    assert rig.vector(bad) is None
    assert rig.reason(good) is FinishReason.LENGTH
    assert rig.scores(good) == rig.expected_scores(good)
    assert rig.vector(good) == rig.expected_vector(good)
    rig.assert_all_free()
