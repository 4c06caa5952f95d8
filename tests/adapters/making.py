"""Adapters for the tests of this folder: in memory, and as PEFT folders on disk."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.device import Arena, HostArena
from adapters.kernels import LoraKernel
from adapters.kernels.groups import GroupKernel
from adapters.kernels.native.bindings import NativeLora
from adapters.kernels.native.compiled import INSTRUCTION_SETS, KernelsMissing
from adapters.kernels.native.kernel import NativeKernel
from adapters.kernels.reference import ReferenceKernel
from adapters.run import RunPlacer
from adapters.types import (
    AdapterPart,
    AdapterRef,
    AdapterUse,
    AdapterWrite,
    LinearTarget,
    LoraEntry,
    ModelTargets,
    Revision,
    TargetId,
)
from adapters.weights import LoraWeights


def made_weights(
    name: str,
    shapes: Mapping[int, tuple[int, int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    has_gain: bool = False,
    has_bias: bool = False,
) -> LoraWeights:
    """An adapter of linear layers, all numbers random; `shapes`: target -> (rank, in, out)."""
    generator = torch.Generator().manual_seed(seed)
    placer = RunPlacer(dtype)
    entries = {
        TargetId(target): LoraEntry(
            rank,
            num_in,
            num_out,
            placer.place(rank * num_in),
            placer.place(num_out * rank),
            offset_gain=placer.place(num_out) if has_gain else None,
            offset_bias=placer.place(num_out) if has_bias else None,
        )
        for target, (rank, num_in, num_out) in sorted(shapes.items())
    }
    run = (torch.randn(placer.num_bytes // dtype.itemsize, generator=generator) * 0.2).to(dtype)
    return LoraWeights(
        revision=Revision(name),
        run=run,
        entries=entries,
        rank=max(entry.rank for entry in entries.values()),
        target_names=("linear",),
        num_bytes=run.nbytes,
    )


def use_of(*revisions: str, scales: Sequence[float] = ()) -> AdapterUse:
    """Adapters that are called as their revisions are; all of them, each as it is or scaled."""
    refs = [AdapterRef(revision, Revision(revision)) for revision in revisions]
    return AdapterUse.sum_of(map(AdapterPart, refs, scales or [1.0] * len(refs)))


def put(arena: Arena, weights: LoraWeights, offset: int = 0) -> None:
    """Make an adapter resident under its revision."""
    ref = AdapterRef(weights.revision, weights.revision)
    arena.write(AdapterWrite(ref, offset, weights.num_bytes), weights)


def made_kernel(name: str, dtype: torch.dtype = torch.float32) -> LoraKernel:
    """By its name; skips the test where our own was not compiled, or this CPU cannot run it."""
    if name in INSTRUCTION_SETS:
        try:
            return NativeKernel(NativeLora(dtype, (name,)))
        except KernelsMissing as missing:
            pytest.skip(f"our own kernel: {missing}")
    return ReferenceKernel() if name == "reference" else GroupKernel()


def host_arena(adapters: Sequence[LoraWeights]) -> HostArena:
    arena = HostArena()
    for weights in adapters:
        put(arena, weights)
    return arena


@dataclass(frozen=True, slots=True)
class Folder:
    """A PEFT folder to break."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "adapter_config.json"

    @property
    def weights_path(self) -> Path:
        return self.path / "adapter_model.safetensors"

    def set(self, **settings: object) -> "Folder":
        """Change settings of the config."""
        config = json.loads(self.config_path.read_text())
        self.config_path.write_text(json.dumps(config | settings))
        return self

    def save(self, tensors: Mapping[str, Tensor]) -> "Folder":
        """Replace the weights."""
        save_file(dict(tensors), self.weights_path)
        return self


HIDDEN, INNER = 8, 12
PROJECTIONS = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (HIDDEN, INNER)}


def small_targets(num_layers: int = 2) -> ModelTargets:
    """q_proj 8 -> 8 and up_proj 8 -> 12 in every layer."""
    return ModelTargets(
        tuple(
            LinearTarget(f"model.layers.{layer}.{name}", num_in, num_out)
            for layer in range(num_layers)
            for name, (num_in, num_out) in PROJECTIONS.items()
        ),
        num_layers,
    )


def small_tensors(rank: int = 2, *, num_layers: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Halves for every target of `small_targets`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for target in small_targets(num_layers).targets:
        key = f"base_model.model.{target.path}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(rank, target.in_features, generator=generator)
        tensors[f"{key}B.weight"] = torch.randn(target.out_features, rank, generator=generator)
    return tensors


def small_folder(path: Path, *, rank: int = 2, seed: int = 0, **settings: object) -> Folder:
    """A valid adapter for `small_targets`."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "up_proj"],
        "base_model_name_or_path": "small",
    }
    folder = Folder(path)
    folder.config_path.write_text(json.dumps(config | settings))
    return folder.save(small_tensors(rank, seed=seed))


def damage(content: bytearray, chance: random.Random, limit: int) -> None:
    """One flip, cut, insertion or swap, mostly where the structure is."""
    if not content:
        return
    at = chance.randrange(min(limit, len(content)))
    kind = chance.choice(["flip", "flip", "flip", "set", "insert", "delete", "cut", "double"])
    if kind == "flip":
        content[at] ^= 1 << chance.randrange(8)
    elif kind == "set":
        content[at] = chance.choice(b'0123456789-"{}[],:.eEx\\\x00\xff')
    elif kind == "insert":
        content[at:at] = chance.choice(
            [b"[", b"{", b'"', b"-", b"0", b"9" * 30, b"null", b"\xed\xa0\x80", b"(("]
        )
    elif kind == "delete":
        del content[at : at + chance.randrange(1, 9)]
    elif kind == "cut":
        del content[at:]
    else:
        content[at:at] = content[at : at + 40]
