"""Paged attention by our own kernels (`attention.h`): keys, values and sums where registers want them.

    layer i   keys   [num_blocks, Hk, Dk / tuple, block_size, tuple]
              values [num_blocks, Hk, block_size / tuple, Dv, tuple]

In eight bits the numbers of a head's block lie in the same order, and behind them is a float32 scale for each
of its tokens: keys [num_blocks, Hk, (Dk + 4) * block_size]. All queries see what is read back, those of the
same step too, so an answer does not depend on how its prompt was cut.

A step is described once for all layers: which token belongs to which sequence, and where its blocks are. What
was never written is never read, so nothing has to be cleared.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.model.attention import AttentionLayer, LayerSpec, QuerySpan, StepContext
from server.model.native.bindings import NativeKernels
from server.model.native.structures import SCALE_BYTES, SequenceRow
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
    """All that the layers need to know of a step. int64."""

    places: Tensor  # [T] where each token's key and value are written
    sequences: Tensor  # [n * 4] a SequenceRow each
    blocks: Tensor  # the tables of the sequences, one after the other


@dataclass(frozen=True, slots=True)
class _HostBatch:
    """A NativeBatch before the move."""

    sequences: slice
    blocks: slice

    def to_device(self, numbers: Tensor, kv_index: Tensor) -> NativeBatch:
        return NativeBatch(kv_index, numbers[self.sequences], numbers[self.blocks])


class NativeAttention:
    """Implements AttentionKernels."""

    def __init__(self, kernels: NativeKernels, *, has_bytes: bool = False) -> None:
        """`has_bytes`: the cache has eight bits for each number."""
        self._kernels = kernels
        self._has_bytes = has_bytes
        self.dtype = kernels.dtype

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.int8 if self._has_bytes else dtype

    def shapes(
        self, layer: LayerSpec, num_blocks: int, block_size: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert block_size % _LANES == 0, "the model was loaded for blocks of another size"
        block, size = (num_blocks, layer.num_kv_heads), self._kernels.tuple_size
        if self._has_bytes:
            dims = layer.key_dim, layer.value_dim
            of_keys, of_values = ((*block, (dim + SCALE_BYTES) * block_size) for dim in dims)
            return of_keys, of_values
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
        sequences: list[int] = []
        blocks: list[int] = []
        token = 0
        for span in spans:
            num_keys = span.start + span.num_tokens
            sequences += SequenceRow(token, span.num_tokens, num_keys, len(blocks))
            blocks += span.block_table[: -(-num_keys // block_size)]
            token += span.num_tokens
        return _HostBatch(numbers.add(sequences), numbers.add(blocks))


class NativeLayer(AttentionLayer):
    """All sequences at once."""

    __slots__ = ("_kernels",)

    def __init__(self, kernels: NativeKernels, index: int, spec: LayerSpec, context: StepContext) -> None:
        super().__init__(index, spec, context)
        self._kernels = kernels

    def _operand_dtype(self) -> torch.dtype:
        return self._kernels.dtype

    def _attend(
        self, batch: NativeBatch, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        return self._kernels.attend(
            q,
            k,
            v,
            self._context.keys[self._index],
            self._context.values[self._index],
            batch.places,
            batch.sequences,
            batch.blocks,
            window=self._spec.sliding_window,
            scale=scale,
        )
