"""The served model without its weights: what an adapter has to fit, in the time that imports take.

The modules are built on torch's meta device, where tensors have shapes and no memory. So a laptop can tell
whether an adapter fits a model that it could never run.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from adapters.layers import find_targets
from adapters.types import ModelTargets
from server.model.base_weights import ModelWeights
from server.model.errors import ModelNotSupported
from server.model.loader import load_config, quiet_transformers, resolve_dtype
from server.model.probe import architecture_name, check_config
from server.model.stored_weights import stored_weights


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What is known of a checkpoint by its config, and of its weights by their files."""

    targets: ModelTargets
    vocab_size: int
    dtype: torch.dtype
    weights: ModelWeights | None  # read when they are asked for; None if there are none to read


def load_skeleton(folder: Path, dtype: str) -> Skeleton:
    """`dtype`: as `load_model` takes it, on the CPU.

    Raises ModelError for what cannot be served; some of that only shows when the weights are loaded.
    """
    config = load_config(folder)
    check_config(config)
    name = architecture_name(config)
    try:
        with torch.device("meta"), quiet_transformers():
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise ModelNotSupported(f"{name} cannot be built from its config") from error
    _give_scales(module)
    targets, served = find_targets(module), resolve_dtype(dtype, torch.device("cpu"), config)
    vocab_size = int(config.get_text_config().vocab_size)
    return Skeleton(targets, vocab_size, served, stored_weights(folder, module, targets, served))


def _give_scales(module: nn.Module) -> None:
    """Gemma's embeddings keep the factor of their rows in a tensor, which has no value on the meta device."""
    for part in module.modules():
        scale = getattr(part, "scalar_embed_scale", None)
        if isinstance(scale, float) and isinstance(getattr(part, "embed_scale", None), torch.Tensor):
            part.register_buffer("embed_scale", torch.tensor(scale), persistent=False)
