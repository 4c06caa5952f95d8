"""For devices with a queue of their own: one group of tokens per adapter, plain torch, no host
synchronisation.

Which tokens belong together is known on the host before the step begins, so nothing is ever read back;
the index arrays were copied once for all layers. Two products per adapter and target, and a gather and a
scatter where an adapter's tokens are not adjacent. Also correct on the CPU, where it is what prefill
uses.
"""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from adapters.types import Revision, TargetId
from adapters.weights import Pair

if TYPE_CHECKING:
    from adapters.batch import LoraBatch, LoraGroup


class GroupKernel:
    """Stateless."""

    def add_lora(self, y: Tensor, x: Tensor, target: TargetId, batch: "LoraBatch") -> Tensor:
        for group in batch.groups:
            pair = batch.arena.view(group.revision, target)
            if pair is not None:
                add_group(y, x, pair, group)
        return y

    def forget(self, revision: Revision) -> None:
        """Nothing is kept."""


def add_group(y: Tensor, x: Tensor, pair: Pair, group: "LoraGroup") -> None:
    """Add one adapter's share to its tokens, in place."""
    a, b = pair
    rows = group.rows
    if isinstance(rows, slice):
        shrunk = F.linear(x[rows], a)  # [n, r]
        y[rows].addmm_(shrunk, b.t(), alpha=group.scale)
    else:
        shrunk = F.linear(x.index_select(0, rows), a)  # [n, r]
        y.index_add_(0, rows, F.linear(shrunk, b), alpha=group.scale)
