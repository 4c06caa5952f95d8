"""Answers equal those of transformers, token by token, in float32, however they are computed."""

from functools import partial

import pytest

from server.model.cpu_kernels import KernelChoice
from server.model.errors import ModelNotSupported
from server.model.native.attention import NativeAttention
from server.types import SamplingParams
from tests.server.model_rig import DRAWN, GREEDY, Checkpoint, Wish, load_tiny, make_model_rig
from tests.server.tiny_models import FAMILIES, WINDOW, greedy, original, prompt_ids

LENGTHS = (1, 5, 23, 40, 9)  # one token; less than a block; longer than the window; many chunks
NUM_TOKENS = 16
NAMED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "gpt2"]
"""The families that are promised by name."""
SPECIAL = ["qwen2-sliding", "gpt-oss", "deepseek-v3"]
"""A full layer before windowed ones; sinks; keys and values of unequal dimensions."""


def wishes(sampling: SamplingParams = GREEDY) -> list[Wish]:
    return [Wish(prompt_ids(n, seed=n), NUM_TOKENS, sampling=sampling, seed=1000 + n) for n in LENGTHS]


@pytest.mark.parametrize(("kernels", "block_size"), [("auto", 16), ("avx2", 16), ("onednn", 8), ("torch", 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(
    family: str, kernels: KernelChoice, block_size: int, checkpoint: Checkpoint
) -> None:
    assert max(LENGTHS) > WINDOW
    folder = checkpoint(family)
    model = original(folder)
    expected = [greedy(model, wish.prompt, wish.num_tokens) for wish in wishes()]
    assert len({token for answer in expected for token in answer}) > 8, "the model repeats itself: no test"
    try:
        served = load_tiny(folder, cpu_kernels=kernels, block_size=block_size)
    except ModelNotSupported as missing:
        pytest.skip(str(missing))
    assert make_model_rig(served, block_size=block_size).generate(wishes()) == expected


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("family", NAMED + SPECIAL)
def test_answers_do_not_depend_on_how_they_are_computed(
    family: str, sampling: SamplingParams, checkpoint: Checkpoint
) -> None:
    model, wanted = load_tiny(checkpoint(family)), wishes(sampling)
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


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kernels", ["native", "avx2"])
def test_answers_do_not_depend_on_how_our_own_kernels_compute_them(
    kernels: KernelChoice, family: str, dtype: str, checkpoint: Checkpoint
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
