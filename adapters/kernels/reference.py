"""What the sums mean: token by token, in float32, rounded once. Slow, and right."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters.run import Terms, TokenRows
from adapters.types import Revision, TargetId

if TYPE_CHECKING:
    from adapters.batch import LoraBatch, LoraGroup


class ReferenceKernel:
    """The oracle of the tests."""

    def add_lora(self, y: Tensor, x: Tensor, target: TargetId, batch: "LoraBatch") -> Tensor:
        """A linear layer: what every adapter changes of the base's answer, summed."""
        base = y.float()
        total = base.clone()
        for group in batch.groups:
            terms = batch.arena.adapter(group.revision).linears.get(target)
            for token in tokens_of(group) if terms is not None else ():
                assert terms is not None
                total[token] += group.scale * change(base[token], terms.a.float() @ x[token].float(), terms)
        return y.copy_(total)

    def forget(self, revision: Revision) -> None:
        """Nothing is kept."""


def change_embeddings(y: Tensor, ids: Tensor, batch: "LoraBatch") -> Tensor:
    """The embedding: y [T, H] of tokens ids [T]."""
    base = y.float()
    total = base.clone()
    for group in batch.groups:
        views = batch.arena.adapter(group.revision)
        for token in tokens_of(group):
            row = _row_of(int(ids[token]), views.embedding_rows)
            if row is not None:
                total[token] += group.scale * (row.float() - base[token])
            if views.embedding is not None:
                shrunk = views.embedding.a[:, ids[token]].float()
                total[token] += group.scale * change(base[token], shrunk, views.embedding)
    return y.copy_(total)


def change_logits(y: Tensor, x: Tensor, batch: "LoraBatch") -> Tensor:
    """The head: y [n, V] of hidden states x [n, H]. Rows of tokens first, for the rest adds to them."""
    base = y.float()
    total = base.clone()
    for group in batch.groups:
        views = batch.arena.adapter(group.revision)
        for token in tokens_of(group):
            mine = base[token].clone()
            if views.head_rows is not None:
                mine[views.head_rows.ids] = views.head_rows.rows.float() @ x[token].float()
            added = mine - base[token]
            if views.head is not None:
                added += change(mine, views.head.a.float() @ x[token].float(), views.head)
            total[token] += group.scale * added
    return y.copy_(total)


def tokens_of(group: "LoraGroup") -> Iterator[int]:
    for start, stop in group.spans:
        yield from range(start, stop)


def change(base: Tensor, shrunk: Tensor, terms: Terms) -> Tensor:
    """Of one token: base [O] is the base's answer, shrunk [r] is A x."""
    changed = terms.b.float() @ shrunk
    if terms.gain is not None:
        changed += terms.gain.float() * base
    if terms.bias is not None:
        changed += terms.bias.float()
    return changed


def _row_of(token_id: int, rows: TokenRows | None) -> Tensor | None:
    if rows is None:
        return None
    at = (rows.ids == token_id).nonzero()
    return rows.rows[int(at[0])] if torch.numel(at) else None
