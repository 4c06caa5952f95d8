import asyncio
import math

import pytest

from adapters.types import AdapterRef
from benchmarks.no_cost.runner import NoCostRunner, StepMark
from server.engine.plan import ScheduledChunk, StepPlan
from server.engine.sequence import Sequence, SequenceId
from server.types import SamplingParams, StopCriteria


def sequence(number: int, tokens: list[int], num_prompt: int, adapter: AdapterRef | None = None) -> Sequence:
    stop = StopCriteria(max_tokens=9)
    return Sequence(SequenceId(number), tokens, num_prompt, SamplingParams(), stop, 0, adapter, 0.0)


def test_each_sequence_gets_the_tokens_in_turn_and_unfinished_prompts_get_none() -> None:
    runner = NoCostRunner((7, 8, 9), 0.0)
    new, grown, unread = sequence(1, [1, 2], 2), sequence(2, [1, 2, 7, 8, 9], 2), sequence(3, [1, 2, 3], 3)
    plan = StepPlan((ScheduledChunk(new, 0, 2), ScheduledChunk(grown, 4, 1), ScheduledChunk(unread, 0, 2)))
    answer = runner.run(plan)
    assert [(token.id, token.token_id) for token in answer.tokens] == [(1, 7), (2, 7)]
    assert runner.marks[0].num_rows == 3


def test_only_full_steps_count() -> None:
    runner = NoCostRunner((7,), 0.0)
    times = [(0.0, 1), (5.0, 10), (6.0, 9), (8.0, 10), (8.5, 2), (20.0, 10)]
    runner.marks = [StepMark(at, rows) for at, rows in times]
    assert runner.full_gaps(10) == [(10, 1.0), (9, 2.0)]
    assert runner.period_s(10) == 1.5
    assert runner.tokens_per_s(10) == pytest.approx(19 / 3)


def test_a_batch_that_was_never_full_has_no_period() -> None:
    assert math.isnan(NoCostRunner((7,), 0.0).period_s(4))


@pytest.mark.slow
def test_the_whole_stack_answers_the_load() -> None:
    from benchmarks.no_cost.__main__ import measure, table
    from benchmarks.no_cost.stack import Size, make_tokenizer

    row = asyncio.run(measure(make_tokenizer(), Size(4, 16, 64), 0.002, ramp_s=0.0))
    assert row.failed == 0
    assert row.chunks_per_s > 0
    assert row.alone_period >= 0.002
    assert row.served_period >= 0.002
    assert "4 streams" in table([row])
