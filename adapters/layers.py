"""Where adapters meet the model: every linear layer inside the decoder layers, wrapped once at load.

A wrapped layer computes its base layer, and then asks the engine's context whether the step has adapters
at all. If not that question is all it costs.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.batch import LoraBatch
from adapters.types import LinearTarget, ModelTargets, TargetId

_EXPERT_LISTS = ("experts",)
"""Linear layers below these see only the tokens that were routed to them, so a step's groups do not apply."""


@dataclass(slots=True)
class LoraContext:
    """The adapters of the step that is being computed; one per engine, set around each forward pass."""

    batch: LoraBatch | None = None


class LoraLinear(nn.Module):
    """A linear layer plus what the adapters of the current step add to it."""

    def __init__(self, base: nn.Module, target: TargetId, linear: LinearTarget, context: LoraContext) -> None:
        """`base` maps [..., in_features] to [..., out_features]; it may be packed, quantised, a Conv1D."""
        super().__init__()
        self.base = base
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._target = target
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        batch = self._context.batch
        if batch is None:
            return y
        flat_x, flat_y = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        assert flat_x.shape[0] == batch.num_tokens, "the layer does not see the tokens of the step"
        return batch.add_lora(flat_y, flat_x, self._target).view(y.shape)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def find_targets(model: nn.Module) -> ModelTargets:
    """Every nn.Linear and Conv1D inside the model's decoder layers: not the embeddings, not the head.

    Call it before layers are packed or wrapped.
    """
    path, layers = _decoder_layers(model)
    targets = []
    for name, module in layers.named_modules(prefix=path):
        if any(part in _EXPERT_LISTS for part in name.split(".")):
            continue
        if isinstance(module, nn.Linear):
            targets.append(LinearTarget(name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            targets.append(LinearTarget(name, module.nx, module.nf))
    return ModelTargets(tuple(targets), len(layers))


def wrap_targets(model: nn.Module, targets: ModelTargets, context: LoraContext) -> None:
    """Put a LoraLinear around every target, in place. TargetId is the position in `targets`."""
    for index, linear in enumerate(targets.targets):
        parent_path, _, name = linear.path.rpartition(".")
        parent = model.get_submodule(parent_path)
        setattr(parent, name, LoraLinear(getattr(parent, name), TargetId(index), linear, context))


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: as long as the config says, and the outermost of that length."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text_config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == length
    ]
    if not lists:
        raise ValueError("the model has no list of decoder layers")
    return min(lists, key=lambda item: item[0].count("."))
