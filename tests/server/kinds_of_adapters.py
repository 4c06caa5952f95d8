"""One adapter of every kind for a tiny model, trained by chance and written by peft itself, and what peft
answers with each.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

ROW_TOKENS = (9, 3, 5)
"""Tokens with trained rows; prompts must have some of them."""

INVOCATION = (7, 4)

_GPT2 = {
    "attention": ["c_attn"],
    "linears": ["c_attn", "c_proj", "c_fc"],
    "embedding": ["wte"],
    "head": ["lm_head"],
}
_LLAMA = {
    "attention": ["q_proj", "v_proj"],
    "linears": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "embedding": ["embed_tokens"],
    "head": ["lm_head"],
}
_OPT = _LLAMA | {"linears": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
_NEOX = {
    "attention": ["query_key_value"],
    "linears": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "embedding": ["embed_in"],
    "head": ["lm_head"],
}
_PHI3 = _LLAMA | {"attention": ["qkv_proj"], "linears": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
MODULES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": _LLAMA,
    "cohere2": _LLAMA,
    "phi3": _PHI3,
    "opt": _OPT,
    "gpt-neox": _NEOX,
    "gpt2": _GPT2,
}


def kinds(family: str, *, is_tied: bool) -> dict[str, dict[str, object]]:
    """Settings by name. Those that peft cannot compute for the family are left out."""
    modules = MODULES[family]
    attention, linears = modules["attention"], modules["linears"]
    embedding, head = modules["embedding"], modules["head"]
    found: dict[str, dict[str, object]] = {
        "plain": {"target_modules": linears, "use_rslora": True},
        "dora": {"target_modules": linears, "use_dora": True, "rank_pattern": {linears[0]: 5}},
        "lora_bias": {"target_modules": linears, "lora_bias": True},
        "embedding": {"target_modules": attention + embedding, "alpha_pattern": {embedding[0]: 2}},
        "head": {"target_modules": attention + head},
        "ends_dora": {"target_modules": attention + embedding + head, "use_dora": True},
        "head_bias": {"target_modules": head, "lora_bias": True},
        "rows": {"target_modules": attention, "trainable_token_indices": list(ROW_TOKENS)},
        "rows_dora": {
            "target_modules": attention,
            "trainable_token_indices": list(ROW_TOKENS),
            "use_dora": True,
        },
        "rows_apart": {
            "target_modules": attention,
            "trainable_token_indices": {embedding[0]: list(ROW_TOKENS), head[0]: [8, 3]},
        },
        "rows_of_head": {
            "target_modules": attention + embedding,
            "trainable_token_indices": {head[0]: [8, 3, 11]},
        },
        "rows_under_head": {
            "target_modules": attention + head,
            "trainable_token_indices": list(ROW_TOKENS),
        },
    }
    if is_tied and embedding == ["embed_tokens"]:
        found["tied"] = {"target_modules": attention + embedding, "ensure_weight_tying": True}
        found["tied_dora"] = {
            "target_modules": attention + embedding,
            "ensure_weight_tying": True,
            "use_dora": True,
        }
    return found


def save_briefly(model: PeftModel, folder: Path, **options: bool) -> None:
    """As peft saves, but without README.md: it compiles that one's template each time."""
    model.create_or_update_model_card = lambda output_dir: None
    model.save_pretrained(folder, **options)


@dataclass(frozen=True)
class Trained:
    """An adapter in a folder, and peft's model with it."""

    folder: Path
    model: PeftModel


def train(
    base: PreTrainedModel, family: str, settings: Mapping[str, object], folder: Path, *, seed: int
) -> Trained:
    """Random numbers everywhere; `base` is left as it was."""
    config = LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 5,
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": family == "gpt2",
            "init_lora_weights": False,
            **settings,
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says what it corrects, ties and saves along
        model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        chance = torch.randn(parameter.shape, generator=generator)
        if "lora_magnitude" in name:
            parameter.data.mul_(1.0 + 0.3 * chance)
        elif "lora_" in name or "trainable_tokens_delta" in name:
            parameter.data.copy_(chance * 0.15)  # in place: tied ones stay tied
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_briefly(model, folder)
    return Trained(folder, model.eval())


def train_all(
    base: Callable[[], PreTrainedModel], family: str, folder: Path, names: tuple[str, ...] = ()
) -> dict[str, Trained]:
    """Adapters by their kind; of all kinds if none is named."""
    model = base()
    found = kinds(family, is_tied=bool(model.config.tie_word_embeddings))
    return {
        name: train(model, family, settings, folder / name, seed=seed)
        for seed, (name, settings) in enumerate(found.items())
        if not names or name in names
    }


def with_row_tokens(prompt: list[int]) -> list[int]:
    """The prompt with tokens in between that have rows of their own in some adapters."""
    half = len(prompt) // 2
    return [*prompt[:half], *ROW_TOKENS, *prompt[half:], ROW_TOKENS[0]]


@torch.inference_mode()
def peft_logits(model: PeftModel, ids: Tensor) -> Tensor:
    """[V] for each token of ids [T]."""
    logits: Tensor = model(input_ids=ids[None]).logits[0]
    return logits
