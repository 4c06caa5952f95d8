"""Answers equal those of transformers, token by token, in float32, however they are computed."""

from collections.abc import Callable
from functools import cache, partial
from itertools import cycle

import pytest
from transformers import PreTrainedModel

from server.model.cpu_kernels import KernelChoice
from server.model.errors import ModelNotSupported
from server.model.native.attention import NativeAttention
from server.types import SamplingParams
from tests.server.model_rig import DRAWN, GREEDY, Checkpoint, Wish, load_tiny, make_model_rig, pairwise
from tests.server.tiny_models import FAMILIES, WINDOW, greedy, greedy_choices, original, prompt_ids

LENGTHS = (1, 5, 23, 40, 9)  # one token; less than a block; longer than the window; many chunks
NUM_TOKENS = 16
NAMED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "gpt2"]
"""The families that are promised by name."""
SPECIAL = ["qwen2-sliding", "gpt-oss", "deepseek-v3"]
"""A full layer before windowed ones; sinks; keys and values of unequal dimensions."""


Transformers = Callable[[str], PreTrainedModel]


@pytest.fixture(scope="module")
def transformers(checkpoint: Checkpoint) -> Transformers:
    """The original of each family, loaded once."""
    return cache(lambda family: original(checkpoint(family)))


def wishes(*samplings: SamplingParams) -> list[Wish]:
    """Greedy ones, unless they take turns with these."""
    turns = cycle(samplings or (GREEDY,))
    return [Wish(prompt_ids(n, seed=n), NUM_TOKENS, sampling=next(turns), seed=1000 + n) for n in LENGTHS]


@pytest.mark.parametrize(("kernels", "block_size"), [("auto", 16), ("avx2", 16), ("onednn", 8), ("torch", 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(
    family: str, kernels: KernelChoice, block_size: int, checkpoint: Checkpoint, transformers: Transformers
) -> None:
    assert max(LENGTHS) > WINDOW
    wanted, model = wishes(), transformers(family)
    try:
        served = load_tiny(checkpoint(family), cpu_kernels=kernels, block_size=block_size)
    except ModelNotSupported as missing:
        pytest.skip(str(missing))
    answers = make_model_rig(served, block_size=block_size).generate(wanted)
    assert answers == [
        greedy_choices(model, wish.prompt, answer) for wish, answer in zip(wanted, answers, strict=True)
    ]
    assert [len(answer) for answer in answers] == [NUM_TOKENS] * len(wanted)
    assert len({token for answer in answers for token in answer}) > 8, "the model repeats itself: no test"


def test_answers_that_equal_their_choices_are_those_that_transformers_generates(
    checkpoint: Checkpoint,
) -> None:
    """What the other tests rest on."""
    model = original(checkpoint("llama"))
    prompt = prompt_ids(9, seed=9)
    answer = greedy(model, prompt, NUM_TOKENS)
    assert greedy_choices(model, prompt, answer) == answer
    other = [*answer[:5], answer[5] + 1, *answer[6:]]
    assert greedy_choices(model, prompt, other)[:6] == answer[:6]


@pytest.mark.parametrize("family", NAMED + SPECIAL)
def test_answers_do_not_depend_on_how_they_are_computed(family: str, checkpoint: Checkpoint) -> None:
    """Nor whether others are drawn or greedy."""
    model, wanted = load_tiny(checkpoint(family)), wishes(DRAWN, GREEDY)
    alone = [make_model_rig(model).generate([wish])[0] for wish in wanted]
    assert make_model_rig(model).generate(wanted) == alone, "staggered, in chunks of at most 7"
    whole = make_model_rig(model, step_tokens=1000)
    assert whole.generate(wanted, is_staggered=False) == alone, "whole prompts, all in one step"
    assert len(whole.stats) == NUM_TOKENS
    cached = make_model_rig(model, prefix_caching=True)
    cached.generate(wanted)
    assert cached.generate(wanted) == alone, "with prompts from the prefix cache"
    assert sum(stats.prefix_hits for stats in cached.stats) > 0
    cramped = make_model_rig(model, num_blocks=13, step_tokens=32)
    assert cramped.generate(wanted) == alone, "preempted and computed again"
    assert sum(stats.preemptions for stats in cramped.stats) > 0


NATIVE = ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "qwen3-moe", "glm4"]
"""Families whose tiny models our own attention computes; the linear layers are ours in every family."""


@pytest.mark.parametrize(("family", "dtype", "kernels"), pairwise(NATIVE))
def test_answers_do_not_depend_on_how_our_own_kernels_compute_them(
    family: str, dtype: str, kernels: KernelChoice, checkpoint: Checkpoint
) -> None:
    wanted = wishes()
    try:
        model = load_tiny(checkpoint(family), dtype=dtype, cpu_kernels=kernels, block_size=16)
    except ModelNotSupported as missing:
        pytest.skip(str(missing))
    assert isinstance(model.attention, NativeAttention)
    rig = partial(make_model_rig, model, block_size=16)
    alone = [rig().generate([wish])[0] for wish in wanted]
    assert rig().generate(wanted) == alone, "staggered, in chunks of at most 7"
    assert rig(step_tokens=1000).generate(wanted, is_staggered=False) == alone, "all in one step"
    cached = rig(prefix_caching=True)
    cached.generate(wanted)
    assert cached.generate(wanted) == alone, "with prompts from the prefix cache"
    cramped = rig(num_blocks=5, step_tokens=32)
    assert cramped.generate(wanted) == alone, "preempted and computed again"
    assert sum(stats.preemptions for stats in cramped.stats) > 0


def test_seeds_matter(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("llama"))
    prompt = prompt_ids(9, seed=9)
    answers = make_model_rig(model).generate(
        [Wish(prompt, 12, sampling=DRAWN, seed=seed) for seed in (1, 2, 1)]
    )
    assert answers[0] == answers[2] != answers[1]
