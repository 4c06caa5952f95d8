"""Ask the loaded model, before it serves anybody, what its attention layers are.

transformers lets an architecture ignore a registered attention function without a word: the model then
computes something, and the paged cache stays empty. So one tiny forward is run with a recorder on every
module. Exactly one call per decoder layer must arrive; what the calls carry (heads, dimensions, window, cap)
sizes the KV cache and shapes the batch. All else is refused by name, at start, instead of answering wrongly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.model.attention import LAYER_ATTRIBUTE, LayerSpec
from server.model.errors import ModelNotSupported

FORWARD_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
)
"""What a model's own code raises when it is called in a way that it was not made for."""

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True)
class ProbedLayer:
    """An attention module, in the order of the forward pass."""

    module: nn.Module
    spec: LayerSpec


def check_config(config: Any) -> None:
    """Refuse, by the config alone, what keeps state outside attention. Raises ModelNotSupported."""
    name = architecture_name(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelNotSupported(f"{name} is an encoder-decoder model; only decoder-only models are served")
    text = config.get_text_config()
    unknown = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if unknown:
        raise ModelNotSupported(
            f"{name} has layers of type {', '.join(unknown)}, which keep state of their own; only "
            "full_attention and sliding_attention are served"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelNotSupported(
            f"the checkpoint of {name} is quantised, which is not served yet; use the original weights"
        )


def max_position(config: Any) -> int:
    """The longest context that is computed exactly, whatever else is in the batch.

    Some rotary embeddings switch their frequencies by the longest position of the *batch*, and Llama 4's
    chunked attention does not tell the attention function its chunk: both are exact below a limit the config
    names.
    """
    text = config.get_text_config()
    limits = [int(text.max_position_embeddings)]
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        limits.append(int(text.attention_chunk_size))
    for rope in _rope_parameters(text):
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            limits.append(int(original or text.max_position_embeddings))
    return min(limits)


def probe_layers(model: nn.Module, config: Any) -> tuple[ProbedLayer, ...]:
    """Run one forward of two tokens and return the attention layers. Raises ModelNotSupported."""
    recorder = _Recorder()
    modules = list(model.modules())
    hooks = [_ModuleRecorder(module, recorder) for module in modules]
    for module, hook in zip(modules, hooks, strict=True):
        setattr(module, LAYER_ATTRIBUTE, hook)
    try:
        _forward(model, architecture_name(config))
    finally:
        for module in modules:
            delattr(module, LAYER_ATTRIBUTE)
    if recorder.has_masks:
        raise ModelNotSupported(
            f"{architecture_name(config)} cannot be served: it makes its own attention masks"
        )
    _check_layers(recorder.layers, config)
    return tuple(recorder.layers)


def find_body(model: nn.Module, config: Any, layers: Sequence[ProbedLayer]) -> nn.Module:
    """The child of the model that all attention layers are in. Raises ModelNotSupported.

    By what it holds and not by a name: the name that transformers keeps for it is wrong for some models.
    """
    wanted = {layer.module for layer in layers}
    for child in model.children():
        if wanted <= set(child.modules()):
            return child
    raise ModelNotSupported(
        f"{architecture_name(config)} cannot be served: its layers are not in one module beside the output "
        "matrix"
    )


def architecture_name(config: Any) -> str:
    """What the operator calls it: the class named in the config, else the model type."""
    named = getattr(config, "architectures", None)
    return str(named[0]) if named else str(config.model_type)


class _Recorder:
    """Collects the calls of one forward."""

    def __init__(self) -> None:
        self.layers: list[ProbedLayer] = []
        # Some layer computes a mask of its own, which the paged attention would not see.
        self.has_masks = False


class _ModuleRecorder:
    """Sits where a PagedLayer will sit, and answers zeros."""

    __slots__ = ("_module", "_recorder")

    def __init__(self, module: nn.Module, recorder: _Recorder) -> None:
        self._module = module
        self._recorder = recorder

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        sinks: Tensor | None,
        **seen: Any,
    ) -> Tensor:
        spec = LayerSpec(
            num_kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            sliding_window=seen.get("sliding_window"),
            softcap=seen.get("softcap"),
            has_sinks=sinks is not None,
        )
        self._recorder.layers.append(ProbedLayer(self._module, spec))
        self._recorder.has_masks |= seen.get("attention_mask") is not None
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def _forward(model: nn.Module, name: str) -> None:
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    positions = torch.arange(2, device=device)[None]
    try:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=positions, use_cache=False)
    except FORWARD_ERRORS as error:
        raise ModelNotSupported(
            f"{name} cannot be served: a forward pass over bare token ids and positions fails "
            f"({type(error).__name__})"
        ) from error


def _check_layers(layers: list[ProbedLayer], config: Any) -> None:
    name, text = architecture_name(config), config.get_text_config()
    expected = int(text.num_hidden_layers)
    if len(layers) != expected:
        raise ModelNotSupported(
            f"{name} cannot be served: {len(layers)} of its {expected} layers use the attention interface of "
            "transformers"
        )
    if len({id(layer.module) for layer in layers}) != expected:
        raise ModelNotSupported(f"{name} cannot be served: several layers share one attention module")
    if any(getattr(layer.module, "is_causal", True) is False for layer in layers):
        raise ModelNotSupported(f"{name} cannot be served: its attention is not causal")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelNotSupported(f"{name} cannot be served: its layers share keys and values with each other")
    types = getattr(text, "layer_types", None) or ()
    for layer_type, layer in zip(types, layers, strict=False):
        if layer_type == "sliding_attention" and layer.spec.sliding_window is None:
            raise ModelNotSupported(f"{name} cannot be served: its sliding layers do not tell their window")


def _rope_parameters(text: Any) -> list[dict[str, Any]]:
    """The rotary settings: one dictionary, or one per layer type."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]
