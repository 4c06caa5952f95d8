"""The two ends of the model: tokens into hidden states, hidden states into logits.

Each is one layer that is computed once a step, so plain torch, adapter by adapter, does for every device.
Nothing is read back from the device. Rows that an adapter has trained for some tokens stand in place of the
base's: before the model for the tokens that are read, behind it in their columns of the logits.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.kernels.groups import add_group, add_shrunk
from adapters.run import Terms, TokenRows

if TYPE_CHECKING:
    from adapters.batch import LoraBatch, LoraGroup


def change_embeddings(y: Tensor, ids: Tensor, batch: "LoraBatch") -> None:
    """y [T, H] of tokens ids [T], in place."""
    for group in batch.groups:
        views = batch.arena.adapter(group.revision)
        if views.embedding_rows is not None:
            _replace_embeddings(y, _of(ids, group), views.embedding_rows, group)
        if views.embedding is not None:
            _add_embeddings(y, _of(ids, group), views.embedding, group)


def change_logits(y: Tensor, x: Tensor, batch: "LoraBatch") -> None:
    """y [n, V] of hidden states x [n, H], in place."""
    for group in batch.groups:
        views = batch.arena.adapter(group.revision)
        if views.head_rows is not None:
            _replace_logits(y, _of(x, group), views.head_rows, group)
        if views.head is not None:
            add_group(y, x, views.head, group)


def _of(values: Tensor, group: "LoraGroup") -> Tensor:
    """Those of the group's tokens."""
    rows = group.rows
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


def _add_embeddings(y: Tensor, ids: Tensor, terms: Terms, group: "LoraGroup") -> None:
    add_shrunk(y, F.embedding(ids, terms.a.t()), terms, group)


def _replace_embeddings(y: Tensor, ids: Tensor, trained: TokenRows, group: "LoraGroup") -> None:
    at = torch.searchsorted(trained.ids, ids).clamp_max_(trained.ids.shape[0] - 1)  # [n]
    is_trained = trained.ids.index_select(0, at) == ids
    old = _of(y, group)
    new = _mixed(old, trained.rows.index_select(0, at), group.scale)
    y[group.rows] = torch.where(is_trained[:, None], new, old)


def _replace_logits(y: Tensor, x: Tensor, trained: TokenRows, group: "LoraGroup") -> None:
    new = F.linear(x, trained.rows)  # [n, k]
    rows = group.rows
    if isinstance(rows, slice):
        mine = y[rows]
        mine.index_copy_(1, trained.ids, _mixed(mine.index_select(1, trained.ids), new, group.scale))
    else:
        where = (rows[:, None], trained.ids[None, :])
        y[where] = _mixed(y[where], new, group.scale)


def _mixed(old: Tensor, new: Tensor, scale: float) -> Tensor:
    return new if scale == 1.0 else torch.lerp(old, new, scale)
