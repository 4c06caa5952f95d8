"""EngineCore: how sequences end, that each ends once, and what the numbers of a step say."""

import logging
from collections.abc import Callable

import pytest

from server.engine.core import ending_after
from server.engine.plan import Resume, RunnerOutput, SampledToken, StepPlan
from server.engine.sequence import Sequence, SequenceId, WaitReason
from server.types import FinishReason, SamplingParams, StopCriteria
from tests.fakes import EOS, Rig, adapter, make_rig

STOP, LENGTH, ABORT, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR


def saying(*tokens: int) -> Callable[[Sequence], int]:
    """A runner that says these tokens to everybody."""
    return lambda sequence: tokens[sequence.num_generated]


def terminal(rig: Rig, sequence_id: SequenceId) -> tuple[FinishReason | None, str | None]:
    news = rig.finish(sequence_id)
    assert news is not None
    return news.finish, news.error


# -- the last token ------------------------------------------------------------------------------------


def test_an_end_of_sequence_token_ends_the_text_with_stop() -> None:
    rig = make_rig(choose=saying(5, EOS))
    one = rig.add([1, 2], ignore_eos=False)
    rig.run()
    assert rig.tokens(one) == [5, EOS]
    assert terminal(rig, one) == (STOP, None)
    assert rig.outputs[one][-1].stop_token is None
    rig.assert_all_free()


def test_a_stop_token_ends_the_text_and_is_named() -> None:
    rig = make_rig(choose=saying(5, 6, 7))
    one = rig.add([1, 2], stop_token_ids=[9, 6])
    rig.run()
    assert rig.tokens(one) == [5, 6]
    assert rig.outputs[one][-1].stop_token == 6


@pytest.mark.parametrize(
    ("generated", "stop", "expected"),
    [
        ([5], StopCriteria(max_tokens=2), None),
        ([5, 5], StopCriteria(max_tokens=2), (LENGTH, None)),
        (
            [5, EOS],
            StopCriteria(max_tokens=2),
            (STOP, None),
        ),  # whole, although it is also the last allowed one
        ([5, 6], StopCriteria(max_tokens=2, stop_token_ids=(6,)), (STOP, 6)),
        ([EOS], StopCriteria(max_tokens=9, ignore_eos=True), None),
        ([EOS], StopCriteria(max_tokens=9, stop_token_ids=(EOS,)), (STOP, None)),
        ([5, 6], StopCriteria(max_tokens=9, eos_token_ids=(6, 7)), (STOP, None)),  # an adapter's own end
        ([5, 6], StopCriteria(max_tokens=9, eos_token_ids=(6,), ignore_eos=True), None),
        ([5, EOS], StopCriteria(max_tokens=9, eos_token_ids=(6,)), (STOP, None)),  # the model's stays one
        ([5, 6], StopCriteria(max_tokens=9, eos_token_ids=(6,), stop_token_ids=(6,)), (STOP, None)),
        ([6], StopCriteria(max_tokens=9, min_tokens=2, eos_token_ids=(6,)), None),
        ([EOS], StopCriteria(max_tokens=9, ignore_eos=True, stop_token_ids=(EOS,)), (STOP, EOS)),
        ([EOS], StopCriteria(max_tokens=9, min_tokens=2), None),
        ([6], StopCriteria(max_tokens=9, min_tokens=2, stop_token_ids=(6,)), None),
        ([5, EOS], StopCriteria(max_tokens=9, min_tokens=2), (STOP, None)),
        ([5] * 7, StopCriteria(max_tokens=9), (LENGTH, None)),  # 3 + 7 fill the context
        ([5] * 6 + [EOS], StopCriteria(max_tokens=9), (STOP, None)),
    ],
)
def test_how_a_text_ends(
    generated: list[int], stop: StopCriteria, expected: tuple[FinishReason, int | None] | None
) -> None:
    tokens = [1, 2, 3, *generated]
    sequence = Sequence(SequenceId(1), tokens, 3, SamplingParams(), stop, seed=0, adapter=None, arrival=0.0)
    ending = ending_after(sequence, eos_token_ids=frozenset({EOS}), max_model_len=10)
    assert (None if ending is None else (ending.reason, ending.stop_token)) == expected


def test_a_full_context_ends_the_text_with_length() -> None:
    rig = make_rig(max_model_len=8)
    one = rig.add([1, 2, 3], max_tokens=50)
    rig.run()
    assert len(rig.tokens(one)) == 5
    assert terminal(rig, one) == (LENGTH, None)


# -- commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "reason", "words"),
    [([], 5, ERROR, "empty"), ([1] * 8, 5, ERROR, "no room"), ([1], 0, LENGTH, None)],
)
def test_what_cannot_run_is_answered_at_once(
    prompt: list[int], max_tokens: int, reason: FinishReason, words: str | None
) -> None:
    rig = make_rig(max_model_len=8)
    one = rig.add(prompt, max_tokens=max_tokens)
    rig.run()
    found, error = terminal(rig, one)
    assert found is reason
    assert words is None if error is None else words is not None and words in error
    assert rig.runner.log == []
    rig.assert_all_free()


@pytest.mark.parametrize("reason", [ABORT, STOP])
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_an_end_is_answered_once_and_frees_at_once_in_every_phase(reason: FinishReason, steps: int) -> None:
    rig = make_rig(max_num_batched_tokens=4)
    one = rig.add(list(range(10)), adapter=adapter("ant"))
    for _ in range(steps):  # 0: waiting; 1: in prefill; 3: first token; 5: later
        rig.step()
    passes = len(rig.runner.log)
    rig.end(one, reason)
    rig.assert_nothing_held()
    rig.end(one, reason)
    rig.run()
    assert terminal(rig, one) == (reason, None)
    assert len(rig.runner.log) == passes, "no forward pass for news alone"
    rig.assert_all_free()


def test_an_end_while_paused_or_preempted_is_answered_too() -> None:
    rig = make_rig(block_size=2, num_blocks=8)
    old, young = rig.add([1] * 5, max_tokens=8), rig.add([2] * 5, max_tokens=8)
    while rig.last is None or rig.last.stats.preemptions == 0:
        rig.step()
    rig.end(young)
    rig.pause(old)
    rig.step()
    rig.end(old)
    rig.run()
    assert terminal(rig, young) == terminal(rig, old) == (ABORT, None)
    rig.assert_all_free()


def test_commands_for_who_is_gone_or_never_was_do_nothing() -> None:
    rig = make_rig()
    one = rig.add([1, 2], max_tokens=1)
    rig.run()
    for sequence_id in (one, SequenceId(99)):
        rig.end(sequence_id)
        rig.pause(sequence_id)
        rig.resume(sequence_id)
    assert rig.step() is None
    assert terminal(rig, one) == (LENGTH, None)


def test_resuming_who_was_not_paused_changes_nothing() -> None:
    rig = make_rig()
    one = rig.add([1, 2], max_tokens=3)
    rig.step()
    rig.handle(Resume(one))
    rig.pause(one)
    rig.pause(one)
    rig.resume(one)
    rig.resume(one)
    rig.run()
    assert rig.tokens(one) == rig.expected(one)


def test_an_aborted_prompt_leaves_nothing_unfinished_in_the_prefix_cache() -> None:
    rig = make_rig(block_size=4, max_num_batched_tokens=6)
    gone = rig.add(range(20))
    rig.step()
    rig.end(gone)
    again = rig.add(range(20))
    rig.step()
    assert rig.runner.log[-1] == {again: (4, 6)}  # one block was whole, the second only half computed
    rig.run()
    assert rig.tokens(again) == rig.expected(again)


# -- failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["start", "end"])
def test_a_failed_step_ends_its_sequences_and_the_loop_goes_on(
    point: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig(block_size=4, max_num_seqs=2)
    pair = [rig.add([number] * 9) for number in range(2)]
    waiting = rig.add([1] * 9)
    rig.step()
    rig.runner.interrupt = raiser(point)
    rig.step()
    rig.runner.interrupt = lambda point: None
    assert [rig.reason(one) for one in pair] == [ERROR, ERROR]
    assert "step failed" in caplog.text
    rig.run()
    assert rig.tokens(waiting) == rig.expected(waiting)
    rig.assert_all_free()


def raiser(at: str) -> Callable[[str], None]:
    def interrupt(point: str) -> None:
        if point == at:
            raise RuntimeError("device")

    return interrupt


def test_nothing_of_a_failed_step_is_published() -> None:
    rig = make_rig(block_size=4, interrupt=raiser("end"))
    rig.add(range(9))
    rig.step()
    rig.runner.interrupt = lambda point: None
    again = rig.add(range(9))
    rig.step()
    assert rig.runner.log[-1] == {again: (0, 9)}


@pytest.mark.parametrize("budget", [4, 64])
def test_a_failed_row_ends_alone_and_what_it_computed_is_not_shared(budget: int) -> None:
    """Also not what it computed in earlier steps, when nobody could see yet that it was bad."""
    rig = make_rig(block_size=4, max_num_batched_tokens=budget)
    bad, good = rig.add(range(9)), rig.add(range(20, 29))
    rig.runner.bad_rows.add(bad)
    rig.run()
    found, error = terminal(rig, bad)
    assert found is ERROR
    assert error is not None
    assert rig.tokens(good) == rig.expected(good)
    again = rig.add(range(9))
    rig.run()
    assert rig.tokens(again) == rig.expected(again)
    assert rig.outputs[again][-1].num_cached == 0


class Liar:
    """A runner that answers for nobody, or for somebody else."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids

    def run(self, plan: StepPlan) -> RunnerOutput:
        return RunnerOutput(tuple(SampledToken(SequenceId(number), 5) for number in self.ids))


@pytest.mark.parametrize("ids", [(), (7,), (1, 1), (1, 7)])
def test_an_answer_that_does_not_match_the_plan_is_a_failed_step(ids: tuple[int, ...]) -> None:
    rig = make_rig()
    rig.core._runner = Liar(*ids)
    one = rig.add([1, 2])
    rig.run()
    assert terminal(rig, one)[0] is ERROR
    rig.assert_all_free()


def test_no_token_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    rig = make_rig(interrupt=raiser("end"))
    rig.add([71, 72, 73])
    rig.run()
    assert "71" not in "".join(record.getMessage() for record in caplog.records)


# -- what a step tells ---------------------------------------------------------------------------------


def test_a_step_reports_what_it_did() -> None:
    rig = make_rig(block_size=4, num_blocks=20, max_num_batched_tokens=12, max_num_seqs=2)
    rig.add(range(5), adapter=adapter("ant"))
    rig.step()
    rig.add(range(20, 40), adapter=adapter("bee"))
    rig.add(range(5), adapter=adapter("cat"))
    output = rig.step()
    assert output is not None
    stats = output.stats
    assert (stats.running, stats.waiting) == (2, 1)
    assert stats.waiting_by == ((WaitReason.CAPACITY, 1),)
    assert (stats.prefill_tokens, stats.decode_tokens) == (11, 1)
    assert (stats.prefix_queries, stats.prefix_hits) == (20, 0)
    assert (stats.blocks_used, stats.blocks_total) == (2 + 5, 20)
    assert stats.adapters_running == stats.adapters_resident == (adapter("ant"), adapter("bee"))
    assert stats.adapters_waiting == (adapter("cat"),)


def test_ends_come_last_so_that_no_token_waits_for_them() -> None:
    rig = make_rig()
    lengths = (2, 3, 2, 3)
    ids = [rig.add([number], max_tokens=length) for number, length in enumerate(lengths)]
    rig.step()
    output = rig.step()
    assert output is not None
    assert [news.id for news in output.outputs] == [ids[1], ids[3], ids[0], ids[2]]
    assert [news.finish for news in output.outputs] == [None, None, LENGTH, LENGTH]


def test_time_comes_from_the_clock() -> None:
    rig = make_rig(max_num_seqs=1)
    rig.runner.interrupt = lambda point: rig.clock.advance(0.25)  # twice a step
    first, second, never = rig.add([1], max_tokens=1), rig.add([2], max_tokens=1), rig.add([3])
    began = rig.clock()
    output = rig.step()
    assert output is not None
    assert (output.at, output.stats.step_s) == (began + 0.5, 0.5)
    rig.end(never)
    rig.run()
    started = [rig.outputs[one][-1].started for one in (first, second, never)]
    assert started == [began, began + 0.51, began + 0.51]


def test_logprobs_pass_through() -> None:
    rig = make_rig()
    one = rig.add([1, 2], max_tokens=1, sampling=SamplingParams(num_logprobs=2))
    rig.run()
    token = rig.outputs[one][0].token
    assert token is not None
    assert token.logprob == -0.5
    assert len(token.alternatives) == 2
