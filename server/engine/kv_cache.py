"""The tensors that hold keys and values, and how many blocks a budget buys.

Bookkeeping (who owns which block) is `blocks.BlockPool`; this is memory only. Memory is not cleared at start:
attention reads a block only through the table of a sequence that entered it, and the runner clears a block as
a sequence enters it without filling it, because a masked position takes part as 0 x value, and 0 x NaN would
be NaN.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from server.model.attention import AttentionKernels, LayerSpec
from server.model.errors import MemoryTooSmall


class KVCache:
    """Keys and values of all layers, for `num_blocks` blocks."""

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        kernels: AttentionKernels,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`dtype`: what the layers compute in."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys: list[Tensor] = []  # by layer, in the kernels' own shape
        self.values: list[Tensor] = []
        self._kernels = kernels
        self.num_bytes = num_blocks * kv_bytes_per_block(layers, kernels, block_size, dtype)
        cached = kernels.cache_dtype(dtype)
        for layer in layers:
            keys, values = kernels.shapes(layer, num_blocks, block_size)
            self.keys.append(torch.empty(keys, dtype=cached, device=device))
            self.values.append(torch.empty(values, dtype=cached, device=device))

    def clear(self, positions: Tensor) -> None:
        """Zero the given positions [n] of all layers, or make them harmless in another way."""
        for cache in (*self.keys, *self.values):
            self._kernels.clear(cache, positions)


def kv_bytes_per_block(
    layers: Sequence[LayerSpec], kernels: AttentionKernels, block_size: int, dtype: torch.dtype
) -> int:
    """Bytes that one block takes over all layers. `dtype`: what they compute in."""
    shapes = [shape for layer in layers for shape in kernels.shapes(layer, 1, block_size)]
    return sum(map(prod, shapes)) * kernels.cache_dtype(dtype).itemsize


def num_kv_blocks(
    budget_bytes: int, bytes_per_block: int, block_size: int, *, max_model_len: int, max_num_seqs: int
) -> int:
    """How many blocks to make: what the budget buys, but no more than all sequences together can use.

    Raises MemoryTooSmall if one sequence of `max_model_len` tokens does not fit.
    """
    affordable = budget_bytes // bytes_per_block
    per_sequence = -(-max_model_len // block_size)
    if affordable < per_sequence:
        longest = max(0, affordable * block_size)
        needed = per_sequence * bytes_per_block
        raise MemoryTooSmall(
            f"one sequence of --max-model-len {max_model_len} tokens needs {needed} bytes of KV memory, but "
            f"only {budget_bytes} are planned: lower --max-model-len to {longest} or raise "
            "--kv-cache-memory-bytes"
        )
    return min(affordable, per_sequence * max_num_seqs)
