"""Merged adapters: the numbers of peft's own `add_weighted_adapter`, and what is refused."""

import itertools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import model as peft_lora
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.errors import AdapterIncompatible, AdapterTooLarge
from adapters.layers import find_targets
from adapters.merge import merge_weights
from adapters.recipes import MajoritySign, MergeMethod, MergeRecipe
from adapters.types import ModelTargets, TargetId
from adapters.weights import LoraWeights, load_weights
from tests.adapters.making import small_folder, small_targets

# peft asks transformers for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BUDGET = 1 << 24
CONFIGS = {
    "ant": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "bee": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"]},
    "cat": {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"]},
}
NAMES = list(CONFIGS)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters with random halves, as peft saves them."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(CONFIGS.items()):
        model = get_peft_model(llama(), LoraConfig(init_lora_weights=False, **settings))
        torch.manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = torch.randn(parameter.shape) * 0.2
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def targets() -> ModelTargets:
    return find_targets(llama())


@pytest.fixture(scope="module")
def loaded(folder: Path, targets: ModelTargets) -> dict[str, LoraWeights]:
    return {name: load_weights(folder / name, targets, torch.float32, BUDGET) for name in NAMES}


def pair_of(weights: LoraWeights, target: TargetId) -> tuple[torch.Tensor, torch.Tensor]:
    pair = weights.view(target)
    assert pair is not None
    return pair


def by_peft(
    folder: Path, names: list[str], recipe: MergeRecipe, seed: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every module, from peft's own merge of its own copies."""
    model = PeftModel.from_pretrained(llama(), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    # peft throws dice for the room of the new adapter, which it does not need; ours begin after that.
    monkeypatch.setattr(peft_lora, "_freeze_adapter", lambda *given: torch.manual_seed(seed))
    model.add_weighted_adapter(
        names,
        list(recipe.weights),
        "merged",
        combination_type=str(recipe.method),
        density=recipe.density,
        majority_sign_method=str(recipe.majority_sign),
    )
    return {
        path.removeprefix("base_model.model."): (
            module.lora_A["merged"].weight.data,
            module.lora_B["merged"].weight.data,
        )
        for path, module in model.named_modules()
        if "merged" in getattr(module, "lora_A", {})
    }


RECIPES = [
    MergeRecipe((0.5, 0.7, 1.0)),
    MergeRecipe((1.0, -0.4, 2.0)),
    MergeRecipe((0.6, 0.0, -1.0), MergeMethod.TIES, 0.4),
    MergeRecipe((0.6, 1.5, 1.0), MergeMethod.TIES, 0.7, MajoritySign.FREQUENCY),
    MergeRecipe((1.0, 1.0, 0.3), MergeMethod.TIES, 0.99),
    MergeRecipe((0.5, -2.0, 1.0), MergeMethod.DARE_LINEAR, 0.5),
    MergeRecipe((1.0, 0.7, 0.2), MergeMethod.DARE_TIES, 0.3),
    MergeRecipe((1.0, -0.7, 0.2), MergeMethod.DARE_TIES, 0.6, MajoritySign.FREQUENCY),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name_for("abc"))
def test_merge_has_the_numbers_of_peft(
    folder: Path,
    targets: ModelTargets,
    loaded: dict[str, LoraWeights],
    recipe: MergeRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merged = merge_weights(recipe, NAMES, [loaded[name] for name in NAMES], targets=targets, max_bytes=BUDGET)
    key = recipe.key([loaded[name].revision for name in NAMES])
    expected = by_peft(folder, NAMES, recipe, int(key[:15], 16), monkeypatch)

    assert merged.revision == key
    assert merged.kinds == ("merged",)
    assert {targets.targets[target].path for target in merged.entries} == set(expected)
    assert merged.target_names == ("q_proj", "v_proj", "up_proj")
    for target in merged.entries:
        pair = pair_of(merged, target)
        for ours, theirs in zip(pair, expected[targets.targets[target].path], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_merge_of_one_adapter_is_that_adapter_times_its_weight(
    targets: ModelTargets, loaded: dict[str, LoraWeights]
) -> None:
    for method, name in itertools.product(MergeMethod, NAMES):
        one = loaded[name]
        merged = merge_weights(
            MergeRecipe((-0.3,), method, 0.5), [name], [one], targets=targets, max_bytes=BUDGET
        )
        for target in one.entries:
            (a, b), (merged_a, merged_b) = pair_of(one, target), pair_of(merged, target)
            torch.testing.assert_close(merged_b @ merged_a, -0.3 * (b @ a), rtol=1e-4, atol=1e-6)


def test_what_is_random_is_the_same_again_and_another_for_other_weights(
    targets: ModelTargets, loaded: dict[str, LoraWeights]
) -> None:
    def merged(*weights: float) -> torch.Tensor:
        recipe = MergeRecipe(weights, MergeMethod.DARE_LINEAR, 0.5)
        adapters = [loaded[name] for name in NAMES]
        return merge_weights(recipe, NAMES, adapters, targets=targets, max_bytes=BUDGET).run

    first = merged(1.0, 1.0, 1.0)
    torch.manual_seed(5)  # what others draw does not matter
    assert torch.equal(merged(1.0, 1.0, 1.0), first)
    assert not torch.equal(merged(1.0, 1.0, 1.0 + 1e-9) == 0, first == 0)


def test_merge_is_served_in_the_dtype_of_its_parts_and_computed_in_float32(
    folder: Path, targets: ModelTargets, loaded: dict[str, LoraWeights]
) -> None:
    half = [load_weights(folder / name, targets, torch.bfloat16, BUDGET) for name in NAMES]
    recipe = MergeRecipe((0.5, 0.7, 1.0))
    merged = merge_weights(recipe, NAMES, half, targets=targets, max_bytes=BUDGET)
    exact = merge_weights(recipe, NAMES, list(loaded.values()), targets=targets, max_bytes=BUDGET)
    assert merged.run.dtype == torch.bfloat16
    assert merged.num_bytes == merged.run.nbytes == exact.num_bytes // 2
    torch.testing.assert_close(merged.run.float(), exact.run, rtol=2e-2, atol=4e-3)


def small(path: Path, rank: int, **settings: object) -> LoraWeights:
    return load_weights(
        small_folder(path, rank=rank, **settings).path, small_targets(), torch.float32, BUDGET
    )


def test_ranks_that_differ_at_a_target_are_refused_by_name(tmp_path: Path) -> None:
    adapters = [small(tmp_path / "a", 2), small(tmp_path / "b", 3)]
    with pytest.raises(AdapterIncompatible) as refused:
        merge_weights(
            MergeRecipe((1.0, 1.0)), ["ant", "bee"], adapters, targets=small_targets(), max_bytes=BUDGET
        )
    assert "model.layers.0.self_attn.q_proj 'ant' has 2, 'bee' has 3" in refused.value.message


def test_merge_that_is_too_large_is_refused(tmp_path: Path) -> None:
    one = small(tmp_path / "a", 2)
    with pytest.raises(AdapterTooLarge):
        merge_weights(
            MergeRecipe((1.0,)), ["ant"], [one], targets=small_targets(), max_bytes=one.num_bytes - 1
        )


def test_merge_that_overflows_the_served_dtype_is_refused(tmp_path: Path) -> None:
    path = small_folder(tmp_path / "a", rank=2, lora_alpha=60000).path
    one = load_weights(path, small_targets(), torch.float32, BUDGET)
    half = LoraWeights(
        one.revision, one.run.half(), one.entries, one.rank, one.target_names, one.num_bytes // 2
    )
    with pytest.raises(AdapterIncompatible):
        merge_weights(
            MergeRecipe((100.0,) * 8), ["a"] * 8, [half] * 8, targets=small_targets(), max_bytes=BUDGET
        )


def test_adapter_that_is_scaled_to_nothing_adds_nothing(tmp_path: Path) -> None:
    adapters = [small(tmp_path / "a", 2), small(tmp_path / "b", 2, lora_alpha=0)]
    alone, both = (
        merge_weights(
            MergeRecipe((1.0,) * count),
            ["ant", "bee"][:count],
            adapters[:count],
            targets=small_targets(),
            max_bytes=BUDGET,
        )
        for count in (1, 2)
    )
    for target in map(TargetId, range(4)):
        for one, other in zip(pair_of(alone, target), pair_of(both, target), strict=True):
            torch.testing.assert_close(one, other)
