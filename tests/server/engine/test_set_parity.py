"""Several adapters at once, and adapters that begin inside a prompt, answer as peft does: token by token, in
float32, with any mix of them in a batch.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from adapters.merge import merge_weights
from adapters.recipes import MergeMethod, MergeRecipe
from adapters.types import AdapterPart, AdapterRef, AdapterUse
from server.engine.invocation import last_start
from tests.server.engine.test_adapter_parity import TARGETS, held, peft_models, save_adapters
from tests.server.kinds_of_adapters import save_briefly
from tests.server.model_rig import DRAWN, GREEDY, Checkpoint, Wish, load_tiny, make_model_rig
from tests.server.tiny_models import greedy, greedy_choices, original, prompt_ids

# peft asks transformers for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NUM_TOKENS = 12
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")
SETS: list[dict[str, float]] = [
    {"full": 0.5, "part": 0.7},
    {"full": 1.0, "part": 1.0, "uneven": 1.0},
    {"full": 1.5, "uneven": -0.5},
    {"full": 0.25},
    {},
    {"part": 1.0},
]


def use_of(scales: dict[str, float], refs: dict[str, AdapterRef]) -> AdapterUse | None:
    return (
        AdapterUse.sum_of(AdapterPart(refs[name], scale) for name, scale in scales.items())
        if scales
        else None
    )


def peft_with(
    folder: Path, folders: dict[str, Path], scales: dict[str, float]
) -> PreTrainedModel | PeftModel:
    """Of peft, with all of these adapters active at once, each at its scale."""
    model = original(folder)
    if not scales:
        return model
    first, *others = scales
    wrapped = PeftModel.from_pretrained(model, folders[first], adapter_name=first)
    for name in others:
        wrapped.load_adapter(folders[name], adapter_name=name)
    wrapped.base_model.set_adapter(list(scales))
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            for name, scale in scales.items():
                layer.set_scale(name, scale)
    return wrapped.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_weighted_sets_answer_as_peft_does_with_all_of_them_active(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    folders = save_adapters(original(folder), family, tmp_path)
    model = load_tiny(folder)
    adapters = held(model, folders)
    refs = {name: ref for name, (ref, _) in adapters.items()}
    prompts = [prompt_ids(length, seed=length) for length in (5, 23, 40, 9, 17, 30)]
    mixed = [
        Wish(prompt, NUM_TOKENS, adapter=use_of(scales, refs))
        for scales, prompt in zip(SETS, prompts, strict=True)
    ]
    weights = dict(adapters.values())
    expected = make_model_rig(model, adapters=weights).generate(mixed)  # in small chunks
    for scales, prompt, answer in zip(SETS, prompts, expected, strict=True):
        assert answer == greedy_choices(peft_with(folder, folders, scales), prompt, answer)
    alone = peft_with(folder, folders, {"full": 1.0})
    single = [greedy_choices(alone, *asked) for asked in zip(prompts, expected, strict=True)]
    assert [a == b for a, b in zip(expected, single, strict=True)].count(True) < 2, "sets without effect"

    whole = make_model_rig(model, adapters=weights, step_tokens=1000, prefix_caching=True)
    assert whole.generate(mixed, is_staggered=False) == expected
    assert whole.generate(mixed) == expected, "from the prefix cache, which tells sets apart"
    assert sum(stats.prefix_hits for stats in whole.stats) > 0
    largest = 3 * max(one.num_bytes for one in weights.values())
    cramped = make_model_rig(model, adapters=weights, arena_bytes=largest, num_blocks=16, step_tokens=32)
    assert cramped.generate(mixed) == expected, "preempted, and adapters evicted and placed again"


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # about merging and saving biases
def test_sets_of_adapters_of_the_ends_and_with_biases_answer_as_peft_does(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """What these do is a sum, too: any of it may be weighted."""
    folder, common = checkpoint("llama"), {"init_lora_weights": False}
    configs = {
        "ends": LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head"], **common),
        "biased": LoraConfig(
            r=2, lora_alpha=4, lora_bias=True, target_modules=["q_proj", "up_proj"], **common
        ),
        "full": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"], **common),
    }
    folders = saved(folder, configs, tmp_path)
    model = load_tiny(folder)
    adapters = held(model, folders)
    refs = {name: ref for name, (ref, _) in adapters.items()}
    sets = [{"ends": 0.5, "full": 0.7}, {"biased": -1.5, "ends": 1.0}, {"biased": 0.5}, {"full": 1.0}]
    asked = [
        (scales, prompt_ids(length, seed=length))
        for scales, length in zip(sets, (23, 9, 17, 30), strict=True)
    ]
    mixed = [Wish(prompt, NUM_TOKENS, adapter=use_of(scales, refs)) for scales, prompt in asked]

    rig = partial(make_model_rig, model, adapters=dict(adapters.values()))
    expected = rig(step_tokens=7).generate(mixed)
    for (scales, prompt), answer in zip(asked, expected, strict=True):
        assert answer == greedy_choices(peft_with(folder, folders, scales), prompt, answer)
        assert answer != greedy_choices(original(folder), prompt, answer), "a set without effect"
    assert rig(step_tokens=1000).generate(mixed) == expected


def test_sets_of_one_prompt_share_no_blocks_unless_they_compute_the_same(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = load_tiny(checkpoint("llama"))
    adapters = held(model, save_adapters(original(checkpoint("llama")), "llama", tmp_path))
    refs = {name: ref for name, (ref, _) in adapters.items()}
    rig = make_model_rig(model, adapters=dict(adapters.values()), step_tokens=1000, prefix_caching=True)
    prompt = prompt_ids(20, seed=1)

    def cached(**scales: float) -> int:
        rig.generate([Wish(prompt, 2, adapter=use_of(scales, refs))])
        return rig.news[0][0].num_cached

    assert cached(full=0.5, part=1.0) == 0
    assert cached(part=1.0, full=0.5) == 16
    assert cached(full=0.5, part=2.0) == 0
    assert cached(full=0.5) == 0
    assert cached(full=1.0) == 0


# --- merged -----------------------------------------------------------------------------------------------


def test_merged_adapter_answers_as_the_one_that_peft_has_merged(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    configs = {
        "ant": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"], init_lora_weights=False),
        "bee": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    }
    folders = saved(folder, configs, tmp_path)
    model = load_tiny(folder)
    adapters = held(model, folders)
    recipe = MergeRecipe((0.9, 1.4), MergeMethod.TIES, 0.6)
    merged = merge_weights(
        recipe,
        list(adapters),
        [weights for _, weights in adapters.values()],
        targets=model.targets,
        max_bytes=1 << 30,
    )
    wrapped = PeftModel.from_pretrained(original(folder), folders["ant"], adapter_name="ant")
    wrapped.load_adapter(folders["bee"], adapter_name="bee")
    wrapped.add_weighted_adapter(["ant", "bee"], [0.9, 1.4], "merged", combination_type="ties", density=0.6)
    wrapped.set_adapter("merged")
    prompts = [prompt_ids(length, seed=length) for length in (5, 23)]
    expected = [greedy(wrapped.eval(), prompt, NUM_TOKENS) for prompt in prompts]
    ref = AdapterRef("merged", merged.revision)

    wishes = [Wish(prompt, NUM_TOKENS, adapter=ref) for prompt in prompts]
    assert make_model_rig(model, adapters={ref: merged}).generate(wishes) == expected


# --- begins inside the prompt -----------------------------------------------------------------------------

INVOCATION = [11, 12]
OTHER_INVOCATION = [13]


def saved(folder: Path, configs: dict[str, LoraConfig], to: Path) -> dict[str, Path]:
    model = original(folder)
    for number, (name, config) in enumerate(configs.items()):
        torch.manual_seed(number)
        wrapped = get_peft_model(model, config)
        save_briefly(wrapped, to / name, save_embedding_layers=False)
        model = wrapped.unload()
    return {name: to / name for name in configs}


def invoked_adapters(folder: Path, family: str, to: Path) -> dict[str, Path]:
    common = {
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": family == "gpt2",
        "init_lora_weights": False,
        "target_modules": TARGETS[family],
    }
    return saved(
        folder,
        {
            "invoked": LoraConfig(r=4, lora_alpha=8, alora_invocation_tokens=INVOCATION, **common),
            "other": LoraConfig(r=2, lora_alpha=6, alora_invocation_tokens=OTHER_INVOCATION, **common),
            "plain": LoraConfig(r=4, lora_alpha=8, **common),
        },
        to,
    )


def without(tokens: list[int], *unwanted: int) -> list[int]:
    return [token if token not in unwanted else 2 for token in tokens]


def invoked_prompts() -> list[tuple[str | None, list[int]]]:
    """Adapters and prompts: invoked in the middle, twice, at the very end, at the very beginning, never."""
    dull = [without(prompt_ids(n, seed=n), *INVOCATION, *OTHER_INVOCATION) for n in (24, 18, 9, 30, 21)]
    return [
        ("invoked", dull[0] + INVOCATION + dull[2]),
        (None, dull[0] + INVOCATION + dull[2]),
        ("plain", dull[0] + INVOCATION + dull[2]),
        ("invoked", dull[1] + INVOCATION + dull[2] + INVOCATION + dull[2][:3]),
        ("invoked", dull[3] + INVOCATION),
        ("invoked", INVOCATION + dull[4]),
        ("invoked", dull[4] + OTHER_INVOCATION),
        ("other", dull[4] + OTHER_INVOCATION + dull[2]),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_that_begin_inside_a_prompt_answer_as_peft_does(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    folders = invoked_adapters(folder, family, tmp_path)
    prompts = invoked_prompts()
    models = peft_models(folder, folders)
    # Answers may hold an invocation, too, and peft looks for it in all that it is given: no `greedy_choices`.
    expected = [greedy(models[name], prompt, NUM_TOKENS) for name, prompt in prompts]
    base = [
        greedy_choices(models[None], prompt, answer)
        for (_, prompt), answer in zip(prompts, expected, strict=True)
    ]
    changed = [index for index, (a, b) in enumerate(zip(expected, base, strict=True)) if a != b]
    assert set(changed) <= {0, 2, 3, 4, 5, 7}, "without its invocation an adapter does nothing"
    assert len(changed) >= 5, "adapters without effect: no test"
    assert expected[0] != expected[2] or family == "gpt2", "where an adapter begins matters"

    model = load_tiny(folder)
    adapters = held(model, folders)
    mixed = []
    for name, prompt in prompts:
        ref, weights = adapters[name] if name is not None else (None, None)
        start = 0
        if weights is not None and weights.invocation_tokens:
            found = last_start(prompt, weights.invocation_tokens)
            ref, start = (None, 0) if found is None else (ref, found)
        mixed.append(Wish(prompt, NUM_TOKENS, adapter=ref, adapter_start=start))
    arena = dict(adapters.values())
    assert make_model_rig(model, adapters=arena).generate(mixed) == expected, "in small chunks"
    whole = make_model_rig(model, adapters=arena, step_tokens=1000, prefix_caching=True)
    assert whole.generate(mixed, is_staggered=False) == expected
    assert whole.generate(mixed) == expected, "from the prefix cache"
    assert sum(stats.prefix_hits for stats in whole.stats) > 0
    cramped = make_model_rig(model, adapters=arena, num_blocks=16, step_tokens=32)
    assert cramped.generate(mixed) == expected, "preempted and computed again"
    drawn = [replace(wish, sampling=DRAWN, seed=i) for i, wish in enumerate(mixed)]
    alone = [make_model_rig(model, adapters=arena).generate([wish])[0] for wish in drawn]
    again = make_model_rig(model, adapters=arena, prefix_caching=True)
    assert again.generate(drawn) == alone


def test_second_request_hits_the_blocks_of_the_base_model_before_the_adapter_begins(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A conversation with the base model goes on with an adapter, and nothing before is computed again."""
    folder = checkpoint("llama")
    folders = invoked_adapters(folder, "llama", tmp_path)
    model = load_tiny(folder)
    ref, weights = held(model, folders)["invoked"]
    assert weights.invocation_tokens == tuple(INVOCATION)
    rig = make_model_rig(model, adapters={ref: weights}, block_size=8, step_tokens=1000, prefix_caching=True)
    talk = without(prompt_ids(30, seed=3), *INVOCATION)
    prompt = talk + INVOCATION + talk[:9]

    def cached(wish: Wish) -> int:
        rig.generate([wish])
        return rig.news[0][0].num_cached

    assert cached(Wish(talk, 4, sampling=GREEDY)) == 0
    invoked = Wish(prompt, 4, adapter=ref, adapter_start=len(talk))
    assert cached(invoked) == 24, "30 tokens come before it begins: three whole blocks of eight"
    assert cached(invoked) == 40, "its own blocks, too"
    assert cached(Wish(prompt, 4)) == 24, "which are not the base model's"
    assert cached(Wish(prompt, 4, adapter=ref)) == 0, "nor those of the adapter from the first token on"
