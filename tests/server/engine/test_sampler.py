"""The sampler against slow and obvious arithmetic, and the promise that a row is alone in the world."""

import math
import random
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from adapters.kernels.native.compiled import INSTRUCTION_SETS, InstructionSet, KernelsMissing
from server.engine.draw import _kept_weights, _nucleus_floor, _Rows, uniform
from server.engine.logit_edits import apply_edits
from server.engine.plan import RunnerOutput
from server.engine.sampler import Sampler, largest
from server.engine.sequence import Sequence, SequenceId
from server.model.native.bindings import NativeKernels, load_kernels
from server.types import SamplingParams, StopCriteria

VOCAB = 700  # more than one head of top_p and not a multiple of a bucket
EOS = 7


def sequence(
    number: int = 0,
    *,
    tokens: tuple[int, ...] = (1, 2, 3),
    num_prompt: int = 2,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    eos_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    seed: int = 0,
    **sampling: Any,
) -> Sequence:
    return Sequence(
        id=SequenceId(number),
        tokens=list(tokens),
        num_prompt=num_prompt,
        sampling=SamplingParams(**sampling),
        stop=StopCriteria(
            max_tokens=100,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            eos_token_ids=eos_token_ids,
            ignore_eos=ignore_eos,
        ),
        seed=seed,
        adapter=None,
        arrival=0.0,
    )


def random_logits(rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def sample(logits: torch.Tensor, *sequences: Sequence) -> RunnerOutput:
    return Sampler(logits.shape[1], frozenset({EOS})).sample(logits, sequences)


def ids(output: RunnerOutput) -> list[int]:
    return [token.token_id for token in output.tokens]


def slow_draw(logits: torch.Tensor, item: Sequence) -> int:
    """Temperature, top_k, top_p, min_p, typical_p and the draw for one row without edits, token by token in
    Python.
    """
    sampling = item.sampling
    peak = float(logits.max())
    scaled = {t: (float(v) - peak) / sampling.temperature for t, v in enumerate(logits)}
    kept = scaled
    if 0 < sampling.top_k < len(scaled):
        lowest = sorted(scaled.values(), reverse=True)[sampling.top_k - 1]
        kept = {t: v for t, v in kept.items() if v >= lowest}
    if sampling.top_p < 1:
        total, mass = sum(math.exp(v) for v in kept.values()), 0.0
        for value in sorted(kept.values(), reverse=True):
            mass += math.exp(value)
            if mass >= sampling.top_p * total:
                kept = {t: v for t, v in kept.items() if v >= value}
                break
    kept = {t: v for t, v in kept.items() if math.exp(v) >= sampling.min_p}
    if sampling.typical_p < 1:
        total = sum(math.exp(v) for v in kept.values())
        entropy = sum(math.exp(v) / total * (math.log(total) - v) for v in kept.values())
        odd = {t: abs(math.log(total) - v - entropy) for t, v in kept.items()}
        mass = 0.0
        for token in sorted(kept, key=odd.__getitem__):
            mass += math.exp(kept[token])
            if mass >= sampling.typical_p * total:
                kept = {t: v for t, v in kept.items() if odd[t] <= odd[token]}
                break
    target = uniform(item.seed, item.num_tokens) * sum(math.exp(v) for v in kept.values())
    mass = 0.0
    for token, value in sorted(kept.items()):
        mass += math.exp(value)
        if mass > target:
            return token
    raise AssertionError("the last kept token takes the rest")


def test_greedy_rows_get_their_first_maximum() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, 5] = logits[0, 9] = 1.0
    logits[1, VOCAB - 1] = 1.0
    greedy = [sequence(i, temperature=0.0) for i in range(2)]
    assert ids(sample(logits, *greedy)) == [5, VOCAB - 1]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 5.0},
        {"top_k": 1},
        {"top_k": 20},
        {"top_k": VOCAB + 5},
        {"top_p": 0.0},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 3.0},  # more tokens than the head of most likely ones
        {"min_p": 0.05},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
        {"typical_p": 0.05},
        {"typical_p": 0.6, "temperature": 1.7},
        {"typical_p": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
    ],
)
def test_draws_follow_the_documented_order(sampling: dict[str, Any]) -> None:
    logits = random_logits(40, seed=1)
    items = [sequence(i, seed=100 + i, **sampling) for i in range(40)]
    assert ids(sample(logits, *items)) == [slow_draw(*pair) for pair in zip(logits, items, strict=True)]


@pytest.mark.parametrize("typical_p", [0.01, 0.3, 0.8, 0.999])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("others", [{}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 1.5}])
def test_typical_p_keeps_what_the_warpers_of_transformers_keep(
    typical_p: float, spread: float, others: dict[str, Any]
) -> None:
    """All rows at once, as other devices do it, and each alone, as the CPU does."""
    logits = random_logits(9, seed=6) * spread
    item = sequence(typical_p=typical_p, **others)
    warpers = LogitsProcessorList([TypicalLogitsWarper(typical_p)])
    if others:
        warpers[:0] = [
            TemperatureLogitsWarper(others["temperature"]),
            TopKLogitsWarper(others["top_k"]),
            TopPLogitsWarper(others["top_p"]),
            MinPLogitsWarper(others["min_p"]),
        ]
    expected = warpers(torch.empty(9, 0, dtype=torch.int64), logits).isfinite()
    assert 0 < expected.sum() < expected.numel()
    rows = _Rows.of(logits, logits.max(-1).values, [item] * 9)
    alone = torch.cat([_kept_weights(rows.take([row])) for row in range(9)])
    for weights in (_kept_weights(rows), alone):
        assert torch.equal(weights[:, :VOCAB] > 0, expected)
        assert not weights[:, VOCAB:].any(), "padding"


def test_typical_p_may_drop_the_most_likely_token() -> None:
    logits = torch.log(torch.tensor([[0.4] + [0.6 / 99] * 99]))
    drawn = {ids(sample(logits, sequence(seed=seed, typical_p=0.3)))[0] for seed in range(50)}
    assert 0 not in drawn
    assert len(drawn) > 10


@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("spread", [0.01, 3.0, 300.0])
def test_nucleus_of_many_rows_is_that_of_each(top_p: float, spread: float) -> None:
    """Bisection, which other devices use, against bins and a sort, which the CPU uses."""
    logits = random_logits(9, seed=4) * spread
    rows = _Rows.of(logits, logits.max(-1).values, [sequence(top_p=top_p)] * 8 + [sequence(top_p=0.5)])
    alone = [_draw_floor(rows.take([row])) for row in range(9)]
    torch.testing.assert_close(_draw_floor(rows), torch.cat(alone))


def _draw_floor(rows: _Rows) -> torch.Tensor:
    x = rows.scaled()
    assert rows.top_p is not None
    return _nucleus_floor(x, x.exp(), rows.top_p)


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125]))
    items = [sequence(i, seed=i) for i in range(4000)]
    counts = torch.bincount(torch.tensor(ids(sample(logits.expand(4000, -1), *items))), minlength=4)
    assert (counts / 4000 - logits.exp()).abs().max() < 0.03


def test_uniform_numbers_depend_on_seed_and_position_and_stay_below_one() -> None:
    drawn = [uniform(seed, position) for seed in (0, 1, -1, 2**64 - 1) for position in range(1000)]
    assert all(0.0 <= number < 1.0 for number in drawn)
    assert len(set(drawn)) == 3 * 1000  # -1 and 2**64 - 1 are one seed
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"top_k": 40},
        {"top_k": 3, "top_p": 0.5},
        {"temperature": 4.0, "top_p": 0.99},
        {"min_p": 0.1},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"frequency_penalty": 0.5, "presence_penalty": 0.2, "logit_bias": ((4, 3.0),)},
        {"num_logprobs": 2},
        {"num_logprobs": 9, "min_p": 0.3},
        {"typical_p": 0.4},
        {"typical_p": 0.9, "top_k": 25, "repetition_penalty": 1.2},
    ]
    logits = random_logits(len(settings), seed=2, dtype=dtype)
    items = [sequence(i, seed=7 * i, **sampling) for i, sampling in enumerate(settings)]
    together = sample(logits, *items).tokens
    alone = [sample(logits[i : i + 1], item).tokens[0] for i, item in enumerate(items)]
    assert list(together) == alone


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = torch.zeros(200, 8)
    logits[:, 0] = 1.0
    drawn = ids(sample(logits, *[sequence(i, seed=i, top_k=2) for i in range(200)]))
    assert set(drawn) == set(range(8))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_tiny_temperatures_are_greedy_without_overflow(temperature: float) -> None:
    logits = random_logits(5, seed=3) * 1000
    drawn = sample(logits, *[sequence(i, seed=i, temperature=temperature) for i in range(5)])
    assert ids(drawn) == logits.argmax(-1).tolist()


def test_bias_comes_before_penalties_and_penalties_before_bans() -> None:
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, 3], logits[0, EOS], logits[0, 4] = 1.0, 100.0, 5.5
    item = sequence(
        temperature=0.0,
        tokens=(3, 9),
        num_prompt=1,
        logit_bias=((3, 9.0),),
        repetition_penalty=2.0,
        min_tokens=5,
    )
    assert ids(sample(logits, item)) == [4]  # (1 + 9) / 2 < 5.5, where 1 / 2 + 9 would win


def test_repetition_penalty_covers_the_prompt_and_pushes_negative_logits_down() -> None:
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, 1], logits[0, 2], logits[0, 3], logits[0, 8] = -1.0, 2.0, 1.9, 1.5
    item = sequence(temperature=0.0, tokens=(1, 2, 3), num_prompt=2, repetition_penalty=1.5)
    assert ids(sample(logits, item)) == [8]  # 2 / 1.5 and 1.9 / 1.5 are below 1.5


def test_frequency_and_presence_penalties_count_the_output_alone() -> None:
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, 1], logits[0, 5], logits[0, 6] = 1.0, 2.0, 1.4
    spared = sequence(temperature=0.0, tokens=(5, 5, 5), num_prompt=3, frequency_penalty=0.5)
    counted = sequence(
        temperature=0.0, tokens=(1, 5, 5), num_prompt=1, frequency_penalty=0.2, presence_penalty=0.3
    )
    assert ids(sample(logits, spared)) == [5]
    assert ids(sample(logits, counted)) == [6]  # 2 - 2 * 0.2 - 0.3 = 1.3


def slow_penalties(logits: torch.Tensor, item: Sequence) -> torch.Tensor:
    """The documented edits of one row, by counting the whole context, or a window's last tokens of it."""
    sampling, edited, output = item.sampling, logits.double(), item.tokens[item.num_prompt :]
    held = item.tokens
    if sampling.penalty_window is not None:
        held = output = item.tokens[-sampling.penalty_window :]
    for token in set(held):
        factor = sampling.repetition_penalty
        edited[token] = edited[token] / factor if edited[token] > 0 else edited[token] * factor
    for token in set(output):
        edited[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
    return edited


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.7},
        {"presence_penalty": -0.4},
        {"repetition_penalty": 0.8, "frequency_penalty": -0.3, "presence_penalty": 0.9},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2, "penalty_window": 8},
        {"repetition_penalty": 1.2, "penalty_window": 1},
        {"frequency_penalty": 0.3, "penalty_window": 1000},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_penalties_of_a_growing_sequence_are_those_of_its_context(
    seed: int, sampling: dict[str, Any]
) -> None:
    """Also where several tokens are appended between two steps, or none: a step may be tried again."""
    dice = random.Random(seed)
    prompt = tuple(dice.choices(range(VOCAB), k=dice.randint(1, 200)))
    growing = sequence(tokens=prompt, num_prompt=len(prompt), **sampling)
    plain = sequence(1, temperature=0.0)
    for step in range(40):
        logits = random_logits(2, seed=100 * seed + step)
        expected = slow_penalties(logits[0], growing)
        apply_edits(logits, [growing, plain], VOCAB, frozenset())
        torch.testing.assert_close(logits[0].double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits[1], random_logits(2, seed=100 * seed + step)[1], rtol=0, atol=0)
        growing.tokens.extend(dice.choices(range(20), k=dice.choice([0, 1, 1, 1, 3])))


def test_penalties_read_each_token_of_a_sequence_once() -> None:
    class Watched(list[int]):
        num_read = 0

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            self.num_read += len(found) if isinstance(key, slice) else 1
            return found

        def __iter__(self) -> Any:
            self.num_read += len(self)
            return super().__iter__()

    tokens = Watched(range(500))
    item = sequence(repetition_penalty=1.1, frequency_penalty=0.1)
    item.tokens, item.num_prompt = tokens, 400
    for token in range(50):
        apply_edits(random_logits(1), [item], VOCAB, frozenset())
        tokens.append(token)
    assert tokens.num_read < 2 * len(tokens)


@pytest.mark.parametrize(("num_generated", "expected"), [(0, 2), (1, 2), (2, EOS)])
def test_ends_are_banned_until_min_tokens(num_generated: int, expected: int) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 11], logits[0, 2] = 3.0, 2.0, 1.0
    item = sequence(
        temperature=0.0,
        tokens=(1,) * (1 + num_generated),
        num_prompt=1,
        min_tokens=2,
        stop_token_ids=(11, 10**9),
    )
    assert ids(sample(logits, item)) == [expected]


@pytest.mark.parametrize(("ignore_eos", "expected"), [(False, 2), (True, 12)])
def test_an_adapter_s_own_end_is_banned_like_the_model_s(ignore_eos: bool, expected: int) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 12], logits[0, 2] = 2.0, 1.0
    item = sequence(temperature=0.0, min_tokens=9, eos_token_ids=(12,), ignore_eos=ignore_eos)
    assert ids(sample(logits, item)) == [expected]


def test_ignored_end_of_sequence_is_not_banned() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 1.0
    assert ids(sample(logits, sequence(temperature=0.0, min_tokens=9, ignore_eos=True))) == [EOS]


def test_bias_on_an_unknown_token_is_ignored() -> None:
    logits = random_logits(1)
    item = sequence(temperature=0.0, logit_bias=((VOCAB, 100.0), (-1, 100.0), (12, 100.0)))
    assert ids(sample(logits, item)) == [12]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"top_p": 0.5}, {"repetition_penalty": 1.2}, {"typical_p": 0.5}]
)
def test_row_that_is_not_finite_fails_alone(bad: float, sampling: dict[str, Any]) -> None:
    logits = random_logits(3)
    logits[1, 17] = bad
    items = [sequence(i, seed=i, num_logprobs=1, **sampling) for i in range(3)]
    output = sample(logits, *items)
    assert output.failed == (SequenceId(1),)
    assert [token.id for token in output.tokens] == [0, 2]


def test_row_without_any_allowed_token_fails() -> None:
    logits = torch.full((1, VOCAB), float("-inf"))
    assert sample(logits, sequence()).failed == (SequenceId(0),)


def test_tokens_that_the_model_rules_out_are_never_drawn() -> None:
    logits = torch.full((300, VOCAB), float("-inf"))
    logits[:, 500:503] = 0.0
    drawn = ids(sample(logits, *[sequence(i, seed=i) for i in range(300)]))
    assert set(drawn) == {500, 501, 502}


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = random_logits(3, seed=5)
    items = [
        sequence(0, temperature=0.0, num_logprobs=3, logit_bias=((33, 1000.0),)),
        sequence(1, temperature=0.0),
        sequence(2, temperature=0.2, top_k=2, num_logprobs=0),
    ]
    forced, plain, drawn = sample(logits, *items).tokens
    expected = logits.double().log_softmax(-1)
    assert forced.token_id == 33
    assert forced.logprob == pytest.approx(float(expected[0, 33]), abs=1e-5)
    assert [a.token_id for a in forced.alternatives] == expected[0].topk(3).indices.tolist()
    assert [a.logprob for a in forced.alternatives] == pytest.approx(
        expected[0].topk(3).values.tolist(), abs=1e-5
    )
    assert plain.logprob is None
    assert drawn.logprob == pytest.approx(float(expected[2, drawn.token_id]), abs=1e-5)
    assert drawn.alternatives == ()


def test_the_models_logits_are_left_as_they_are() -> None:
    logits = random_logits(2)
    before = logits.clone()
    sample(logits, sequence(0, top_p=0.5), sequence(1, temperature=0.0, repetition_penalty=3.0))
    assert torch.equal(logits, before)


WHOSE: list[InstructionSet | None] = [None, *INSTRUCTION_SETS]


def kernels_of(instructions: InstructionSet | None, dtype: torch.dtype) -> NativeKernels | None:
    """Ours for these instructions; None: torch's. Skips the test where they do not run."""
    if instructions is None:
        return None
    try:
        return load_kernels(dtype, (instructions,), beside_amx=True)
    except KernelsMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [5, 8191, 8192, 12_288, 20_000])
def test_the_largest_is_found_wherever_it_is_and_the_first_of_equals(
    size: int, dtype: torch.dtype, whose: InstructionSet | None
) -> None:
    kernels = kernels_of(whose, dtype)
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(40, size, generator=generator).to(dtype)  # bfloat16 has many equals
    for row, place in enumerate((0, size - 1, size // 2)):
        logits[row, place] = 100.0
    logits[3, 2:] = 50.0  # all of the others
    logits[4] = float("-inf")
    logits[5] -= 1000.0  # none is above zero, and nothing that is not there is

    peak, ids = largest(logits, kernels)

    assert torch.equal(peak, logits.amax(-1))
    firsts = (logits == peak[:, None]).int().argmax(-1)
    assert torch.equal(ids, firsts)


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("place", [0, 4096, 9999, 10_004])
def test_what_is_not_a_number_is_the_largest(
    place: int, dtype: torch.dtype, whose: InstructionSet | None
) -> None:
    logits = torch.full((2, 10_005), float("inf"), dtype=dtype)
    logits[1, place:] = float("nan")
    if place % 2:
        logits[1].neg_()  # of either sign

    peak, ids = largest(logits, kernels_of(whose, dtype))

    assert peak.isnan().tolist() == [False, True]
    assert ids.tolist() == [0, place]


def test_kernels_for_other_numbers_are_not_asked() -> None:
    kernels = kernels_of(INSTRUCTION_SETS[0], torch.bfloat16)
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))

    peak, ids = largest(logits, kernels)

    assert torch.equal(peak, logits.amax(-1))
    assert torch.equal(ids, logits.argmax(-1))
