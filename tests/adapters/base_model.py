"""A base model of four targets for tests of loading: two linear layers, an embedding and a head."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from adapters.types import LinearTarget, ModelTargets, TargetId, TargetKind
from adapters.weights import LoraWeights, load_weights
from tests.adapters.making import Folder

TOKENS, WIDTH, INNER, RANK = 20, 8, 12, 2
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"
TARGETS = ModelTargets(
    (
        LinearTarget(Q, WIDTH, WIDTH),
        LinearTarget(UP, WIDTH, INNER),
        LinearTarget(EMBED, TOKENS, WIDTH, TargetKind.EMBEDDING),
        LinearTarget(HEAD, WIDTH, TOKENS, TargetKind.HEAD),
    ),
    num_layers=1,
)
TIED = replace(TARGETS, is_tied=True)
SCALED = replace(TIED, embed_scale=3.0)


@dataclass(frozen=True)
class DenseBase:
    """Implements `adapters.base.BaseWeights` with plain tensors: W [out, in] of each target."""

    weights: tuple[Tensor, ...]
    biases: Mapping[int, Tensor]

    @classmethod
    def random(cls, *, biased: tuple[int, ...] = (0,)) -> "DenseBase":
        """`biased`: the targets that have a bias."""
        generator = torch.Generator().manual_seed(7)
        shapes = [(target.out_features, target.in_features) for target in TARGETS.targets]
        return cls(
            tuple(torch.randn(shape, generator=generator) for shape in shapes),
            {index: torch.randn(shapes[index][0], generator=generator) for index in biased},
        )

    def squared_norms(self, target: TargetId) -> Tensor:
        return self.weights[target].square().sum(1)

    def project(self, target: TargetId, a: Tensor) -> Tensor:
        return self.weights[target] @ a.t()

    def bias(self, target: TargetId) -> Tensor | None:
        return self.biases.get(target)

    def table(self, target: int) -> Tensor:
        """[tokens, width]"""
        weight = self.weights[target]
        return weight.t() if TARGETS.targets[target].kind is TargetKind.EMBEDDING else weight

    def token_rows(self, target: TargetId, num_rows: int) -> Iterator[Tensor]:
        yield from self.table(target).contiguous().split(num_rows)


def key(path: str, part: str) -> str:
    return f"base_model.model.{path}.{part}"


def halves(path: str, *, seed: int = 0) -> dict[str, Tensor]:
    """A and B of a target, as PEFT names them."""
    generator = torch.Generator().manual_seed(seed + len(path))
    linear = next(target for target in TARGETS.targets if target.path == path)
    a = torch.randn(RANK, linear.in_features, generator=generator)
    b = torch.randn(linear.out_features, RANK, generator=generator)
    if linear.kind is TargetKind.EMBEDDING:
        return {key(path, "lora_embedding_A"): a, key(path, "lora_embedding_B"): b}
    return {key(path, "lora_A.weight"): a, key(path, "lora_B.weight"): b}


def vector(path: str, part: str, *, seed: int = 0) -> dict[str, Tensor]:
    """A magnitude or a bias: positive numbers."""
    generator = torch.Generator().manual_seed(seed + len(path))
    linear = next(target for target in TARGETS.targets if target.path == path)
    return {key(path, part): torch.rand(linear.out_features, generator=generator) + 0.5}


def rows(path: str, count: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Trained rows of tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {key(path, "token_adapter.trainable_tokens_delta"): torch.randn(count, WIDTH, generator=generator)}


def made_folder(path: Path, tensors: Mapping[str, Tensor], **settings: object) -> Folder:
    """An adapter with these tensors; what the config does not say is rank 2 and scale 2 on all modules."""
    path.mkdir(parents=True, exist_ok=True)
    folder = Folder(path)
    names = ["q_proj", "up_proj", "embed_tokens", "lm_head"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": names}
    folder.config_path.write_text(json.dumps(config | settings))
    return folder.save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})


def load(
    folder: Folder,
    targets: ModelTargets = TARGETS,
    base: DenseBase | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    max_bytes: int = 1 << 20,
) -> LoraWeights:
    return load_weights(folder.path, targets, dtype, max_bytes, base or DenseBase.random())
