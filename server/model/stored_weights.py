"""A checkpoint's weights for those who ask for few of them: read from the files when they are asked for.

What the check of an adapter needs of the base model (`adapters.base.BaseWeights`) is next to nothing, mostly
nothing at all; so the model is not loaded for it. A module's weight lies under the module's own name, or
under one that ends in it, or that lacks its first part: checkpoints of a model with a tower beside, or of a
body alone. Weights that a checkpoint stores in another form are not found.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.errors import AdapterUnavailable
from adapters.types import ModelTargets
from server.model.base_weights import ModelWeights

_CPU = torch.device("cpu")


class StoredModule(nn.Module):
    """Stands where a module of the model would stand. Its weight is [out, in], an embedding's a table."""

    def __init__(self, tensors: "StoredTensors", path: str, *, has_bias: bool, is_transposed: bool) -> None:
        super().__init__()
        self._tensors = tensors
        self._path = path
        self._has_bias = has_bias
        self._is_transposed = is_transposed

    @property
    def weight(self) -> Tensor:
        weight = self._tensors.read(f"{self._path}.weight")
        return weight.t() if self._is_transposed else weight

    @property
    def bias(self) -> Tensor | None:
        return self._tensors.read(f"{self._path}.bias") if self._has_bias else None


class StoredTensors:
    """The tensors of a checkpoint's safetensors files, by name, in the served dtype."""

    def __init__(self, files: Iterable[Path], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._file_of: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as stored:
                self._file_of |= dict.fromkeys(stored.keys(), file)

    def read(self, name: str) -> Tensor:
        """Raises AdapterUnavailable if it is not there: whether an adapter fits it cannot be told."""
        known = self._find(name)
        if known is None:
            raise AdapterUnavailable(
                f"the checkpoint holds no {name}, which this adapter depends on; only a server that has"
                " loaded the model can tell",
                retry_after_s=0,
            )
        with safe_open(self._file_of[known], "pt") as stored:
            tensor: Tensor = stored.get_tensor(known)
        return tensor.to(self._dtype)

    def _find(self, name: str) -> str | None:
        if name in self._file_of:
            return name
        rest = name.partition(".")[2]
        return next((one for one in self._file_of if one.endswith(f".{name}") or one == rest), None)


def stored_weights(
    folder: Path, module: nn.Module, targets: ModelTargets, dtype: torch.dtype
) -> ModelWeights | None:
    """Of the targets of a model that was built without its weights; None if there are no files to read."""
    files = sorted(folder.glob("*.safetensors"))
    try:
        tensors = StoredTensors(files, dtype)
        return ModelWeights(
            [_stored(module, target.path, tensors) for target in targets.targets], targets, _CPU
        )
    except (SafetensorError, OSError, AdapterUnavailable):
        return None


def _stored(module: nn.Module, path: str, tensors: StoredTensors) -> StoredModule:
    part = module.get_submodule(path)
    has_bias = getattr(part, "bias", None) is not None
    return StoredModule(tensors, path, has_bias=has_bias, is_transposed=isinstance(part, Conv1D))
