"""Tiny checkpoints of many architectures, with weights wild enough that greedy answers vary.

Every family is saved as a real folder and loaded as a real checkpoint. The vocabulary, the heads and the
windows are small on purpose: prompts of the tests are longer than the windows and do not divide the blocks.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 300
WINDOW = 16

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "head_dim": 24}),
    "gpt2": ("gpt2", _GPT2),
    "stablelm": ("stablelm", {}),
    "gpt-oss": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    "olmo2": ("olmo2", {}),
    "cohere2": ("cohere2", {"sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 16}),
    "gpt-neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "granite": ("granite", {}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "glm4": ("glm4", {"head_dim": 16}),
    "smollm3": ("smollm3", {}),
    "llama4": ("llama4_text", {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 96}),
}


def tiny_config(model_type: str, extra: dict[str, Any]) -> Any:
    """A config of the type with the small sizes of this module."""
    config = CONFIG_MAPPING[model_type](**{**_BASE, **extra})
    config.architectures = None
    return config


def tiny_model(family: str, *, seed: int = 0, std: float = 0.12) -> PreTrainedModel:
    """A float32 model whose matrices are normal with `std`: with the usual 0.02 greedy answers repeat one
    token.
    """
    model_type, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, extra), attn_implementation="eager")
    model = model.eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Where input and output embeddings are one, large ones answer each token with itself.
                share = 0.25 if "embed" in name and model.config.tie_word_embeddings else 1.0
                parameter.normal_(0.0, std * share, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def save_tiny(family: str, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """Write the checkpoint and return the model that it holds."""
    model = tiny_model(family, seed=seed)
    model.save_pretrained(folder)
    return model


def original(folder: Path) -> PreTrainedModel:
    """The checkpoint as transformers alone computes it, in float32."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def prompt_ids(length: int, *, seed: int) -> list[int]:
    """Ordinary tokens: no padding, no beginning."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()


def greedy_choices(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[int]:
    """What transformers takes for most probable in place of each token of an answer, after the prompt and the
    tokens before. An answer that equals its own choices is what `greedy` generates: seen in one pass through
    the model, and not in one for each token.
    """
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist()


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers itself generates."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()
