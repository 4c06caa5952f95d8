"""A small step that a model computes at load, with its own modules and with ours in their place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server.model.attention import LayerSpec, StepContext
from server.model.native.attention import NativeAttention, NativeBatch
from server.model.native.structures import SequenceRow

_TOKENS = 5


@dataclass(frozen=True, slots=True)
class SmallStep:
    """A few tokens of one sequence, and a cache that all layers take turns to use."""

    context: StepContext
    attention: NativeAttention
    specs: Sequence[LayerSpec]
    block_size: int

    @contextmanager
    def running(self) -> Iterator[Tensor]:
        """The ids [T] to compute meanwhile."""
        context = self.context
        before = context.batch, context.block_size, context.keys, context.values
        num_blocks = -(-_TOKENS // self.block_size)
        keys, values = (
            torch.zeros(shape, dtype=self.attention.cache_dtype(self.attention.dtype))
            for shape in self.attention.shapes(self.specs[0], num_blocks, self.block_size)
        )
        context.batch = NativeBatch(
            torch.arange(_TOKENS),
            torch.tensor(SequenceRow(0, _TOKENS, _TOKENS, 0)),
            torch.arange(num_blocks),
        )
        context.block_size = self.block_size
        context.keys, context.values = [keys] * len(self.specs), [values] * len(self.specs)
        try:
            yield torch.arange(_TOKENS)
        finally:
            context.batch, context.block_size, context.keys, context.values = before


def hidden_states(body: nn.Module, ids: Tensor) -> Tensor:
    """What the body makes of these ids [T] at the first positions: [1, T, H]."""
    positions = torch.arange(len(ids))[None]
    hidden: Tensor = body(input_ids=ids[None], position_ids=positions, use_cache=False).last_hidden_state
    return hidden


def is_near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Within a share of the largest. NaN is near nothing."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
