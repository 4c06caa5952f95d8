import asyncio
import json
import math

import pytest

from adapters.types import AdapterRef
from benchmarks.no_cost.added import added_latencies, arrivals
from benchmarks.no_cost.receiver import Piece, Reading, number_of, pieces, prompt_of
from benchmarks.no_cost.runner import NoCostRunner, StepMark
from server.engine.plan import ScheduledChunk, StepPlan
from server.engine.sequence import Sequence, SequenceId
from server.types import SamplingParams, StopCriteria


def sequence(number: int, tokens: list[int], num_prompt: int, adapter: AdapterRef | None = None) -> Sequence:
    stop = StopCriteria(max_tokens=9)
    return Sequence(SequenceId(number), tokens, num_prompt, SamplingParams(), stop, 0, adapter, 0.0)


def mark(at: float, rows: int, sampled: tuple[Sequence, ...] = ()) -> StepMark:
    return StepMark(at, rows, at + 1.0, sampled)


def answer_of(texts: list[str]) -> bytes:
    """An HTTP answer with a frame, in a chunk of its own, for each text."""
    frames = [json.dumps({"choices": [{"index": 0, "text": text}]}) for text in texts]
    events = [f"data: {frame}\n\n" for frame in [*frames, '{"choices":[],"usage":null}', "[DONE]"]]
    chunks = [f"{len(event):x}\r\n{event}\r\n" for event in [": kept alive\n\n", *events]]
    return "".join(["HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", *chunks, "0\r\n\r\n"]).encode()


def test_each_sequence_gets_the_tokens_in_turn_and_unfinished_prompts_get_none() -> None:
    runner = NoCostRunner((7, 8, 9), 0.0)
    new, grown, unread = sequence(1, [1, 2], 2), sequence(2, [1, 2, 7, 8, 9], 2), sequence(3, [1, 2, 3], 3)
    plan = StepPlan((ScheduledChunk(new, 0, 2), ScheduledChunk(grown, 4, 1), ScheduledChunk(unread, 0, 2)))
    answer = runner.run(plan)
    assert [(token.id, token.token_id) for token in answer.tokens] == [(1, 7), (2, 7)]
    assert runner.marks[0].num_rows == 3
    assert runner.marks[0].sampled == (new, grown)
    assert runner.marks[0].ended >= runner.marks[0].at


def test_only_full_steps_count() -> None:
    runner = NoCostRunner((7,), 0.0)
    times = [(0.0, 1), (5.0, 10), (6.0, 9), (8.0, 10), (8.5, 2), (20.0, 10)]
    runner.marks = [mark(at, rows) for at, rows in times]
    assert runner.full_gaps(10) == [(10, 1.0), (9, 2.0)]
    assert runner.period_s(10) == 1.5
    assert runner.tokens_per_s(10) == pytest.approx(19 / 3)


def test_a_batch_that_was_never_full_has_no_period() -> None:
    assert math.isnan(NoCostRunner((7,), 0.0).period_s(4))


@pytest.mark.parametrize("number", [0, 7, 256, 65_535])
def test_a_prompt_says_whose_it_is(number: int) -> None:
    assert number_of(prompt_of(number, 16)) == number
    assert len(prompt_of(number, 16)) == 16


@pytest.mark.parametrize("cut", [1, 2, 7, 80, 300, 5_000])
def test_text_is_there_once_its_chunk_is(cut: int) -> None:
    raw = answer_of([" a", " few", "", " words"])
    parts = [raw[i : i + cut] for i in range(0, len(raw), cut)]
    found = pieces([Reading(float(i), part) for i, part in enumerate(parts)])
    assert [piece.num_characters for piece in found] == [2, 6, 12]
    ends = [raw.index(text) + len(text) for text in (b' a"}]}\n\n', b' few"}]}\n\n', b' words"}]}\n\n')]
    assert [piece.at for piece in found] == [(end - 1) // cut for end in ends]


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 429 Too Many Requests\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        answer_of([" a"])[:-5],
        answer_of([" a"]).replace(b"choices", b"mistake"),
        b"",
    ],
)
def test_an_answer_that_is_not_good_is_refused(raw: bytes) -> None:
    with pytest.raises(RuntimeError):
        pieces([Reading(0.0, raw)])


def test_joined_tokens_came_together_and_a_split_one_with_its_last_character() -> None:
    grown = [Piece(1.0, 2), Piece(4.0, 9), Piece(5.0, 10), Piece(6.0, 12)]
    assert arrivals(grown, [2, 6, 9, 12]) == [1.0, 4.0, 4.0, 6.0]


@pytest.mark.parametrize("grown", [[], [Piece(1.0, 2)], [Piece(1.0, 4)]])
def test_a_text_of_another_length_is_refused(grown: list[Piece]) -> None:
    with pytest.raises(ValueError, match="3 characters"):
        arrivals(grown, [2, 3])


def test_a_token_is_found_by_its_request_and_its_turn() -> None:
    first, second = sequence(8, prompt_of(0, 3), 3), sequence(5, prompt_of(1, 3), 3)
    marks = [
        mark(0.0, 1, (first,)),  # ends at 1.0, and is not full
        mark(1.0, 2, (second, first)),
        mark(2.0, 2, (second,)),  # the other one's prompt is being computed again
        mark(3.0, 2, (first, second)),
    ]
    came = [[9.0, 2.5, 4.75], [2.25, 4.5, 9.0]]
    assert added_latencies(marks, came, 2) == [0.25, 0.5, 1.5, 0.75, 5.0]


@pytest.mark.slow
def test_the_whole_stack_answers_the_load() -> None:
    from benchmarks.no_cost.__main__ import measure, table
    from benchmarks.no_cost.stack import Size, make_tokenizer

    row = asyncio.run(measure(make_tokenizer(), Size(4, 16, 64), 0.002, ramp_s=0.0))
    assert row.failed == 0
    assert row.chunks_per_s > 0
    assert row.alone_period >= 0.002
    assert row.served_period >= 0.002
    assert 0 < row.added_latency_p50 <= row.added_latency_p99 < 5
    assert "4 streams" in table([row])


@pytest.mark.slow
def test_flat_out_nothing_is_said_of_the_latency() -> None:
    from benchmarks.no_cost.__main__ import measure, table
    from benchmarks.no_cost.stack import Size, make_tokenizer

    row = asyncio.run(measure(make_tokenizer(), Size(2, 16, 16), 0.0, ramp_s=0.0))
    assert math.isnan(row.added_latency_p50)
    assert math.isnan(row.added_latency_p99)
    assert "added latency p99, ms" in table([row])
