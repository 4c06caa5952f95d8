"""The served model's weights, as the loader of adapters asks for them (`adapters.base.BaseWeights`).

On the CPU most weights are packed. Their products with a few rows go through the packed layer itself, as in
a step, and the lengths of their rows are worked out once, from a dense copy that is dropped again. Dense
weights, and tables that are packed, are read a slice at a time. On another device all of it runs on a stream
of its own: the engine's neither waits for it nor is waited for.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.types import ModelTargets, TargetId, TargetKind
from server.model.packed_embedding import PackedEmbedding
from server.model.packed_linear import PackedLinear

_SLICE_ELEMENTS = 1 << 21  # of a weight at once, 8 MiB in float32


class ModelWeights:
    """Reads only. Any thread may call it; two that ask for the same lengths at once both work them out."""

    def __init__(self, modules: Sequence[nn.Module], targets: ModelTargets, device: torch.device) -> None:
        """`modules`: of each target, after they were packed and before they are wrapped.

        A head that is tied is read through the embedding.
        """
        self._modules = tuple(modules)
        self._targets = targets.targets
        self._tables: Mapping[TargetId, nn.Module] = _tables(self._modules, targets)
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._norms: dict[TargetId, Tensor] = {}
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)  # the weights are there, whatever stream asks for them later

    @torch.inference_mode()
    def squared_norms(self, target: TargetId) -> Tensor:
        norms = self._norms.get(target)
        if norms is None:
            is_table = self._targets[target].kind is TargetKind.EMBEDDING
            with self._beside():
                sums = [part.float().square().sum(0 if is_table else 1) for part in self._parts(target)]
                norms = (torch.stack(sums).sum(0) if is_table else torch.cat(sums)).cpu()
            self._norms[target] = norms
        return norms

    @torch.inference_mode()
    def project(self, target: TargetId, a: Tensor) -> Tensor:
        module = self._modules[target]
        with self._beside():
            if isinstance(module, PackedLinear) and target not in self._tables:
                return module.product(a.to(module.dtype)).float().t()
            a, parts = a.to(self._device), self._parts(target)
            if self._targets[target].kind is not TargetKind.EMBEDDING:
                return torch.cat([part.float() @ a.t() for part in parts]).cpu()
            total, start = a.new_zeros(self._targets[target].out_features, a.shape[0]), 0
            for part in parts:
                total += part.float().t() @ a[:, start : start + part.shape[0]].t()
                start += part.shape[0]
            return total.cpu()

    @torch.inference_mode()
    def bias(self, target: TargetId) -> Tensor | None:
        bias = getattr(self._modules[target], "bias", None)
        if bias is None:
            return None
        assert isinstance(bias, Tensor)
        with self._beside():
            return bias.detach().float().cpu()

    @torch.inference_mode()
    def token_rows(self, target: TargetId, num_rows: int) -> Iterator[Tensor]:
        with self._beside():
            parts = self._parts(target, num_rows)
        while True:
            with self._beside():
                part = next(parts, None)
                if part is None:
                    return
                part = part.cpu()
            yield part

    def _parts(self, target: TargetId, num_rows: int | None = None) -> Iterator[Tensor]:
        """[out, in], some rows at a time; of an embedding and of a head that is tied to it the table [tokens,
        width].
        """
        table = self._tables.get(target)
        if isinstance(table, PackedEmbedding):
            ids = torch.arange(table.num_rows)
            return map(table.rows, torch.split(ids, num_rows or _rows_at_once(table.weight)))
        weight = self._dense(target) if table is None else table.weight
        assert isinstance(weight, Tensor)
        return iter(torch.split(weight, num_rows or _rows_at_once(weight)))

    def _dense(self, target: TargetId) -> Tensor:
        module = self._modules[target]
        if isinstance(module, PackedLinear):
            return module.dense()
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.t() if isinstance(module, Conv1D) else weight

    def _beside(self) -> AbstractContextManager[object]:
        """Work that is queued in here does not stand in the engine's queue."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _tables(modules: Sequence[nn.Module], targets: ModelTargets) -> dict[TargetId, nn.Module]:
    """The embedding, for itself and for a head that is tied to it."""
    if targets.embedding is None:
        return {}
    table = modules[targets.embedding]
    tables = {targets.embedding: table}
    if targets.is_tied and targets.head is not None:
        tables[targets.head] = table
    return tables


def _rows_at_once(weight: Tensor) -> int:
    return max(1, _SLICE_ELEMENTS // weight.shape[1])
