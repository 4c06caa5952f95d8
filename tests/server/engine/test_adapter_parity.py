"""Answers with adapters equal those of peft, token by token, in float32, with any mix of them in a batch."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from adapters.types import AdapterRef
from adapters.weights import LoraWeights, load_weights
from server.model.loader import LoadedModel
from tests.server.kinds_of_adapters import save_briefly
from tests.server.model_rig import DRAWN, GREEDY, Checkpoint, Wish, load_tiny, make_model_rig
from tests.server.tiny_models import greedy_choices, original, prompt_ids

# peft asks transformers for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTHS = (1, 5, 23, 40, 9)  # as in test_parity
NUM_TOKENS = 12

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama": ATTENTION + MLP,
    "qwen2": ATTENTION + MLP,
    "qwen2-sliding": ATTENTION + MLP,
    "qwen3": ATTENTION + MLP,
    "mistral": ATTENTION + MLP,
    "gemma2": ATTENTION + MLP,
    "gemma3": ATTENTION + MLP,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "mixtral": ATTENTION,
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def lora_configs(family: str) -> dict[str, LoraConfig]:
    """All targets; some targets of one layer by rsLoRA; ranks and strengths of their own for some."""
    targets, transposed = TARGETS[family], family == "gpt2"
    common = {"task_type": "CAUSAL_LM", "fan_in_fan_out": transposed, "init_lora_weights": False}
    return {
        "full": LoraConfig(r=4, lora_alpha=8, target_modules=targets, **common),
        "part": LoraConfig(
            r=8, lora_alpha=16, use_rslora=True, target_modules=targets[:2], layers_to_transform=[1], **common
        ),
        "uneven": LoraConfig(
            r=2,
            lora_alpha=6,
            target_modules=targets[-3:],
            rank_pattern={targets[-1]: 5},
            alpha_pattern={targets[-1]: 3},
            **common,
        ),
    }


def save_adapters(model: PreTrainedModel, family: str, folder: Path) -> dict[str, Path]:
    """Random adapters, written by peft itself; the model is left without them."""
    folders = {}
    for number, (name, config) in enumerate(lora_configs(family).items()):
        torch.manual_seed(number)
        wrapped = get_peft_model(model, config)
        save_briefly(wrapped, folder / name)
        model = wrapped.unload()
        folders[name] = folder / name
    return folders


def peft_models(folder: Path, adapters: dict[str, Path]) -> dict[str | None, PreTrainedModel | PeftModel]:
    """The base, and models that have just one adapter each."""
    models: dict[str | None, PreTrainedModel | PeftModel] = {None: original(folder)}
    for name, path in adapters.items():
        models[name] = PeftModel.from_pretrained(original(folder), path).eval()
    return models


def held(model: LoadedModel, folders: dict[str, Path]) -> dict[str, tuple[AdapterRef, LoraWeights]]:
    loaded = {name: load_weights(path, model.targets, model.dtype, 1 << 30) for name, path in folders.items()}
    return {name: (AdapterRef(name, weights.revision), weights) for name, weights in loaded.items()}


@pytest.mark.parametrize("family", TARGETS)
def test_mixed_adapters_answer_as_peft_does_with_each(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    folders = save_adapters(original(folder), family, tmp_path)
    model = load_tiny(folder)
    adapters = held(model, folders)
    names = ("full", None, "part", "uneven", "full")
    refs = [adapters[name][0] if name else None for name in names]
    mixed = [
        Wish(prompt_ids(n, seed=n), NUM_TOKENS, adapter=ref) for n, ref in zip(LENGTHS, refs, strict=True)
    ]
    weights = dict(adapters.values())
    expected = make_model_rig(model, adapters=weights).generate(mixed)
    peft = peft_models(folder, folders)
    for wish, name, answer in zip(mixed, names, expected, strict=True):
        assert answer == greedy_choices(peft[name], wish.prompt, answer)
    base = [
        greedy_choices(peft[None], wish.prompt, answer) for wish, answer in zip(mixed, expected, strict=True)
    ]
    assert [a == b for a, b in zip(expected, base, strict=True)].count(True) < 4, (
        "adapters without effect: no test"
    )
    in_torch = make_model_rig(model, adapters=weights, native_adapters=False)
    assert in_torch.generate(mixed) == expected
    native = make_model_rig(load_tiny(folder, block_size=16), adapters=weights, block_size=16)
    assert native.generate(mixed) == expected
    whole = make_model_rig(model, adapters=weights, step_tokens=1000, prefix_caching=True)
    assert whole.generate(mixed, is_staggered=False) == expected
    assert whole.generate(mixed) == expected, "from the prefix cache, which is told adapters apart"


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gemma2", "mixtral", "gpt2"])
def test_mixed_adapters_do_not_depend_on_how_they_are_computed(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Greedy and drawn rows of the base model and of three adapters side by side."""
    folder = checkpoint(family)
    model = load_tiny(folder)
    adapters = held(model, save_adapters(original(folder), family, tmp_path))
    weights = dict(adapters.values())
    refs = [None, *weights, None, *weights]
    mixed = [
        Wish(
            prompt_ids(LENGTHS[i % len(LENGTHS)], seed=i),
            NUM_TOKENS,
            adapter=ref,
            sampling=GREEDY if i < 4 else DRAWN,
            seed=i,
        )
        for i, ref in enumerate(refs)
    ]
    alone = [make_model_rig(model, adapters=weights).generate([wish])[0] for wish in mixed]
    assert len({tuple(answer) for answer in alone}) == len(mixed), "rows that answer alike: no test"
    assert make_model_rig(model, adapters=weights).generate(mixed) == alone, "staggered, in small chunks"
    cached = make_model_rig(model, adapters=weights, step_tokens=1000, prefix_caching=True)
    assert cached.generate(mixed, is_staggered=False) == alone, "whole prompts, all in one step"
    assert cached.generate(mixed) == alone, "with prompts from the prefix cache"
    assert sum(stats.prefix_hits for stats in cached.stats) > 0
    cramped = make_model_rig(model, adapters=weights, num_blocks=13, step_tokens=32)
    assert cramped.generate(mixed) == alone, "preempted and computed again"
    assert sum(stats.preemptions for stats in cramped.stats) > 0


@pytest.mark.parametrize("prefetches", [False, True])
def test_adapters_take_turns_in_an_arena_for_one(
    checkpoint: Checkpoint, tmp_path: Path, prefetches: bool
) -> None:
    folder = checkpoint("llama")
    folders = save_adapters(original(folder), "llama", tmp_path)
    model = load_tiny(folder)
    adapters = held(model, folders)
    mixed = [
        Wish(prompt_ids(9, seed=i), 6, adapter=ref, sampling=sampling, seed=i)
        for i, (ref, _) in enumerate(adapters.values())
        for sampling in (GREEDY, DRAWN)
    ]
    weights = dict(adapters.values())
    roomy = make_model_rig(model, adapters=weights).generate(mixed)
    largest = max(held_weights.num_bytes for held_weights in weights.values())
    cramped = make_model_rig(model, adapters=weights, arena_bytes=largest, prefetches=prefetches)
    assert cramped.generate(mixed) == roomy
    beside = make_model_rig(model, adapters=weights, arena_bytes=2 * largest, prefetches=prefetches)
    assert beside.generate(mixed) == roomy
