"""Paged attention by our own kernels (`attention.h`): keys, values and sums where AVX-512 wants them.

    layer i   keys   [num_blocks, Hk, Dk / tuple, block_size, tuple]
              values [num_blocks, Hk, block_size / tuple, Dv, tuple]

A step is described once for all layers: which token belongs to which sequence, and where its blocks are. What
was never written is never read, so nothing has to be cleared.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.model.attention import LayerSpec, QuerySpan, StepContext
from server.model.native.library import Kernels, SequenceRow
from server.model.transfer import Numbers

_LANES = 16
_MAX_DIM = 256


def can_attend(layers: Iterable[LayerSpec], block_size: int) -> bool:
    """Whether these kernels compute what such layers do."""
    return block_size % _LANES == 0 and all(map(_is_plain, layers))


def _is_plain(layer: LayerSpec) -> bool:
    dims = layer.key_dim, layer.value_dim
    return (
        layer.softcap is None
        and not layer.has_sinks
        and max(dims) <= _MAX_DIM
        and all(dim % _LANES == 0 for dim in dims)
    )


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """All that the layers need to know of a step."""

    places: Tensor  # int64 [T]: where each token's key and value are written
    sequences: Tensor  # int64 [n, 4]
    blocks: Tensor  # int32: the tables of the sequences, one after the other


@dataclass(frozen=True, slots=True)
class _HostBatch:
    sequences: tuple[SequenceRow, ...]
    blocks: tuple[int, ...]

    def to_device(self, numbers: Tensor, kv_index: Tensor) -> NativeBatch:
        return NativeBatch(
            kv_index,
            torch.tensor(self.sequences, dtype=torch.int64),
            torch.tensor(self.blocks, dtype=torch.int32),
        )


class NativeAttention:
    """Implements AttentionKernels."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.dtype = kernels.dtype

    def shapes(
        self, layer: LayerSpec, num_blocks: int, block_size: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert block_size % _LANES == 0, "the model was loaded for blocks of another size"
        block, size = (num_blocks, layer.num_kv_heads), self._kernels.tuple_size
        keys = *block, layer.key_dim // size, block_size, size
        return keys, (*block, block_size // size, layer.value_dim, size)

    def clear(self, cache: Tensor, positions: Tensor) -> None:
        """Nothing unwritten is read."""

    def layer(self, index: int, spec: LayerSpec, context: StepContext) -> "NativeLayer":
        return NativeLayer(self._kernels, index, spec, context)

    def describe(
        self,
        spans: Sequence[QuerySpan],
        numbers: Numbers,
        *,
        windows: Iterable[int | None],
        block_size: int,
        dtype: torch.dtype,
    ) -> _HostBatch:
        sequences: list[SequenceRow] = []
        blocks: list[int] = []
        token = 0
        for span in spans:
            num_keys = span.start + span.num_tokens
            sequences.append(SequenceRow(token, span.num_tokens, num_keys, len(blocks)))
            blocks += span.block_table[: -(-num_keys // block_size)]
            token += span.num_tokens
        return _HostBatch(tuple(sequences), tuple(blocks))


class NativeLayer:
    """One attention layer of one engine."""

    __slots__ = ("_context", "_index", "_kernels", "_spec")

    def __init__(self, kernels: Kernels, index: int, spec: LayerSpec, context: StepContext) -> None:
        self._kernels = kernels
        self._index = index
        self._spec = spec
        self._context = context

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        sinks: Tensor | None,
        **seen: Any,
    ) -> Tensor:
        """query [1, Hq, T, Dk], key [1, Hk, T, Dk], value [1, Hk, T, Dv], keys already rotated; returns
        [1, T, Hq, Dv].
        """
        context = self._context
        batch = context.batch
        if batch is None:
            raise RuntimeError("the model was called outside a step")
        dtype = context.keys[self._index].dtype  # the casts do nothing except where norms leave float32
        out = self._kernels.attend(
            query[0].to(dtype),
            key[0].to(dtype),
            value[0].to(dtype),
            context.keys[self._index],
            context.values[self._index],
            batch.places,
            batch.sequences,
            batch.blocks,
            window=self._spec.sliding_window,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        )
        return out[None].to(query.dtype)
