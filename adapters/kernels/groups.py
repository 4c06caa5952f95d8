"""For every device: one group of tokens per adapter, plain torch, no host synchronisation.

Which tokens belong together is known on the host before the step begins, so nothing is ever read back;
the index arrays were copied once for all layers. Two products per adapter and target, and a gather and a
scatter where an adapter's tokens are not adjacent.
"""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from adapters.run import Terms
from adapters.types import Revision, TargetId

if TYPE_CHECKING:
    from adapters.batch import LoraBatch, LoraGroup


class GroupKernel:
    """Stateless."""

    def add_lora(self, y: Tensor, x: Tensor, target: TargetId, batch: "LoraBatch") -> Tensor:
        for group in batch.groups:
            terms = batch.arena.adapter(group.revision).linears.get(target)
            if terms is not None:
                add_group(y, x, terms, group)
        return y

    def forget(self, revision: Revision) -> None:
        """Nothing is kept."""


def add_group(y: Tensor, x: Tensor, terms: Terms, group: "LoraGroup") -> None:
    """Add what one adapter changes to its tokens, in place. y [T, O], x [T, I]"""
    rows = group.rows
    mine = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    add_shrunk(y, F.linear(mine, terms.a), terms, group)


def add_shrunk(y: Tensor, shrunk: Tensor, terms: Terms, group: "LoraGroup") -> None:
    """The same, given A x of the group's own tokens [n, r]."""
    rows, scale = group.rows, group.scale
    if isinstance(rows, slice):
        mine = y[rows]
        if terms.gain is not None:
            mine.addcmul_(mine, terms.gain, value=scale)
        if terms.bias is not None:
            mine.add_(terms.bias, alpha=scale)
        mine.addmm_(shrunk, terms.b.t(), alpha=scale)
        return
    added = F.linear(shrunk, terms.b, terms.bias)
    if terms.gain is not None:
        added.addcmul_(y.index_select(0, rows), terms.gain)
    y.index_add_(0, rows, added, alpha=scale)
