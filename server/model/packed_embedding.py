"""The embedding of a model whose head has the same weight: it reads its rows out of the packed head.

The table of a small model is a quarter of it and more. Packed and dense it would lie in memory twice, for a
few rows a step; a row is read out of the packed weight as it was, bit for bit.
"""

import torch
from torch import Tensor, nn

from adapters.types import ModelTargets
from server.model.native.linear import NativeLinear

_COMPARED_ROWS = 64


class PackedEmbedding(nn.Module):
    """ids [...] -> [..., width]; an id that is no row of the head raises IndexError."""

    def __init__(self, head: NativeLinear, scale: float) -> None:
        """`scale`: what the model multiplies rows by (Gemma), a number of the weight's dtype."""
        super().__init__()
        self._heads = (head,)  # not a child: it is one already, elsewhere
        self._scale = scale
        # Some models ask the weight for its dtype; it has no numbers, so that nobody computes with it.
        self.weight = torch.empty(head.out_features, head.in_features, dtype=head.dtype, device="meta")

    @property
    def num_rows(self) -> int:
        return self._heads[0].out_features

    def rows(self, ids: Tensor) -> Tensor:
        """Of the table, unscaled: [n] -> [n, width]."""
        return self._heads[0].rows(ids)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_rows:
            raise IndexError("an id is not in the embedding")
        rows = self.rows(flat)
        if self._scale != 1.0:
            rows *= torch.tensor(self._scale, dtype=rows.dtype)
        return rows.view(*ids.shape, self._heads[0].in_features)


def share_head(model: nn.Module, targets: ModelTargets) -> bool:
    """Let a tied embedding read the packed head, if it then gives the same rows; whether it does so now.

    Call it after the head was packed, before anything is wrapped.
    """
    if not targets.is_tied or targets.embedding is None or targets.head is None:
        return False
    path = targets.targets[targets.embedding].path
    embedding, head = model.get_submodule(path), model.get_submodule(targets.targets[targets.head].path)
    if not isinstance(head, NativeLinear):
        return False
    packed = PackedEmbedding(head, targets.embed_scale)
    ids = torch.linspace(0, packed.num_rows - 1, _COMPARED_ROWS).long()
    with torch.inference_mode():
        if not torch.equal(packed(ids), embedding(ids)):
            return False
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, packed)
    return True
