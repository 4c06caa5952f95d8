"""Where adapters meet the model: what an adapter may change is wrapped once at load.

    tokens -> [embedding] -> decoder layers with [linear] layers -> [head] -> logits

A wrapped layer computes its base layer, and then asks the engine's context whether the step has adapters
at all. If not that question is all it costs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.batch import LoraBatch
from adapters.types import LinearTarget, ModelTargets, TargetId, TargetKind

_EXPERT_LISTS = ("experts",)
"""Linear layers below these see only the tokens that were routed to them, so a step's groups do not apply."""


@dataclass(slots=True)
class LoraContext:
    """The adapters of the step that is being computed; one per engine, set around each forward pass."""

    batch: LoraBatch | None = None
    head: LoraBatch | None = None  # of the rows that the head is about to see; None: nothing changes there


class LoraLinear(nn.Module):
    """A linear layer plus what the adapters of the current step add to it."""

    def __init__(self, base: nn.Module, target: TargetId, linear: LinearTarget, context: LoraContext) -> None:
        """`base` maps [..., in_features] to [..., out_features]; it may be packed, quantised, a Conv1D."""
        super().__init__()
        self.base = base
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.target = target
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        batch = self._context.batch
        if batch is None:
            return y
        flat_x, flat_y = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        assert flat_x.shape[0] == batch.num_tokens, "the layer does not see the tokens of the step"
        return batch.add_lora(flat_y, flat_x, self.target).view(y.shape)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class LoraHead(nn.Module):
    """The output matrix, whose rows are not those of the step."""

    def __init__(self, base: nn.Module, linear: LinearTarget, context: LoraContext) -> None:
        super().__init__()
        self.base = base
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        batch = self._context.head
        if batch is None:
            return y
        flat_x, flat_y = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        assert flat_x.shape[0] == batch.num_tokens, "the head does not see the rows that were announced"
        batch.change_logits(flat_y, flat_x)
        return flat_y.view(y.shape)


class LoraEmbedding(nn.Module):
    """The embedding, with the rows that the adapters of the current step change."""

    def __init__(self, base: nn.Module, linear: LinearTarget, context: LoraContext) -> None:
        super().__init__()
        self.base = base
        self.out_features = linear.out_features
        self._context = context

    @property
    def weight(self) -> Tensor:
        """The base's; some models ask for its dtype."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        batch = self._context.batch
        if batch is None:
            return y
        flat_ids, flat_y = ids.reshape(-1), y.reshape(-1, self.out_features)
        assert flat_ids.shape[0] == batch.num_tokens, "the embedding does not see the tokens of the step"
        batch.change_embeddings(flat_y, flat_ids)
        return flat_y.view(y.shape)


def find_targets(model: nn.Module) -> ModelTargets:
    """Every nn.Linear and Conv1D inside the model's decoder layers, the embedding, and the head.

    Call it before layers are packed or wrapped.
    """
    path, layers = decoder_layers(model)
    targets = []
    for name, module in layers.named_modules(prefix=path):
        if any(part in _EXPERT_LISTS for part in name.split(".")):
            continue
        if isinstance(module, nn.Linear):
            size = module.in_features, module.out_features
            targets.append(LinearTarget(name, *size, has_bias=module.bias is not None))
        elif isinstance(module, Conv1D):
            targets.append(LinearTarget(name, module.nx, module.nf, has_bias=True))
    embedding, head = (_end(model, f"get_{end}_embeddings") for end in ("input", "output"))
    scale = 1.0
    if isinstance(embedding, nn.Embedding):
        width, count = embedding.embedding_dim, embedding.num_embeddings
        targets.append(LinearTarget(_path_of(model, embedding), count, width, TargetKind.EMBEDDING))
        scale = _embed_scale(embedding)
    if isinstance(head, nn.Linear):
        path, size = _path_of(model, head), (head.in_features, head.out_features)
        targets.append(LinearTarget(path, *size, TargetKind.HEAD, has_bias=head.bias is not None))
    is_tied = (
        isinstance(embedding, nn.Embedding)
        and isinstance(head, nn.Linear)
        and head.weight is embedding.weight
    )
    return ModelTargets(tuple(targets), len(layers), scale, is_tied)


def wrap_targets(model: nn.Module, targets: ModelTargets, context: LoraContext) -> None:
    """Put a layer of this module around every target, in place. TargetId is the position in `targets`."""
    for index, linear in enumerate(targets.targets):
        parent_path, _, name = linear.path.rpartition(".")
        parent = model.get_submodule(parent_path)
        base = getattr(parent, name)
        wrapped: nn.Module
        if linear.kind is TargetKind.EMBEDDING:
            wrapped = LoraEmbedding(base, linear, context)
        elif linear.kind is TargetKind.HEAD:
            wrapped = LoraHead(base, linear, context)
        else:
            wrapped = LoraLinear(base, TargetId(index), linear, context)
        setattr(parent, name, wrapped)


def _end(model: nn.Module, getter: str) -> nn.Module | None:
    """What the model itself calls its embedding or its head; None where it has none."""
    found = getattr(model, getter, lambda: None)
    try:
        module = found()
    except NotImplementedError:
        return None
    return module if isinstance(module, nn.Module) else None


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    name: str = next(name for name, module in model.named_modules() if module is wanted)
    return name


def _embed_scale(embedding: nn.Embedding) -> float:
    """Gemma's embeddings multiply their rows, by a number in the dtype of the rows."""
    scale = getattr(embedding, "embed_scale", 1.0)
    return float(torch.as_tensor(scale).to(embedding.weight.dtype))


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its path: as long as the config says, the outermost of that length."""
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
