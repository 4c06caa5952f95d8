"""Which tokens of a step belong to which adapter. Built once per step, read by every layer.

    rows     (a, 3) (base, 1) (b, 1) (a, 1)        as they lie in the batch: (adapters, number of tokens)
    tokens    a a a     .       b      a
    groups   a: [0, 1, 2, 5]    b: [4:5]      a slice where an adapter's tokens are adjacent, else an index

Tokens of the base model are in no group: they cost nothing and are not touched. A row may use several
adapters, each with a scale: its tokens are then in several groups, and what these add is summed. A step in
which no row has an adapter has no LoraBatch at all. The head of the model sees rows of its own, the ones
whose logits are wanted, so it gets a batch of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.device import Arena
from adapters.kernels import ends
from adapters.types import AdapterUse, Revision, TargetId


@dataclass(frozen=True, slots=True, eq=False)
class LoraGroup:
    """All tokens of a step that use one adapter at one scale."""

    revision: Revision
    scale: float  # of what the adapter adds
    num_tokens: int
    spans: tuple[tuple[int, int], ...]  # [start, stop) of tokens, ascending, not adjacent to each other
    rows: (
        slice | Tensor
    )  # the same: a slice if there is one span, else int64 [num_tokens] on the arena's device


@dataclass(frozen=True, slots=True, eq=False)
class LoraBatch:
    """A step's tokens by adapter, and the arena that holds those adapters. At least one group."""

    arena: Arena
    num_tokens: int  # of the whole step, with those of the base model
    groups: tuple[LoraGroup, ...]  # sorted by revision and scale, so that equal sets look equal

    @classmethod
    def build(cls, arena: Arena, rows: Sequence[tuple[AdapterUse | None, int]]) -> "LoraBatch | None":
        """`rows`: (adapters, number of tokens) in batch order; None: the base model.

        None when no row has an adapter. The adapters must be resident in the arena. Copies small index
        arrays to the device without waiting for it.
        """
        spans: dict[tuple[Revision, float], list[tuple[int, int]]] = {}
        stop = 0
        for use, num_tokens in rows:
            start, stop = stop, stop + num_tokens
            if use is None or num_tokens == 0:
                continue
            for part in use.parts:
                mine = spans.setdefault((part.ref.revision, part.scale), [])
                if mine and mine[-1][1] == start:
                    mine[-1] = (mine[-1][0], stop)
                else:
                    mine.append((start, stop))
        if not spans:
            return None
        groups = tuple(_group(arena.device, *which, spans[which]) for which in sorted(spans))
        return cls(arena, stop, groups)

    def for_head(self, rows: Sequence[int] | None) -> "LoraBatch | None":
        """The same for a head that sees these tokens of the step, in this order; None: all of them.

        None when no adapter of theirs changes the head.
        """
        groups = tuple(group for group in self.groups if self.arena.adapter(group.revision).changes_head)
        if not groups:
            return None
        changing = LoraBatch(self.arena, self.num_tokens, groups)
        return changing if rows is None else changing.among(rows)

    def among(self, rows: Sequence[int]) -> "LoraBatch | None":
        """The same for these tokens of the step alone, numbered in this order.

        None when none of them has an adapter.
        """
        groups = [theirs for group in self.groups if (theirs := _among(group, rows, self.arena.device))]
        return LoraBatch(self.arena, len(rows), tuple(groups)) if groups else None

    def add_lora(self, y: Tensor, x: Tensor, target: TargetId) -> Tensor:
        """y [T, O] plus what the adapters add for inputs x [T, I]. Changes `y` or replaces it."""
        return self.arena.kernel.add_lora(y, x, target, self)

    def change_embeddings(self, y: Tensor, ids: Tensor) -> None:
        """What the adapters change of embeddings y [T, H] of tokens [T], in place."""
        ends.change_embeddings(y, ids, self)

    def change_logits(self, y: Tensor, x: Tensor) -> None:
        """What the adapters change of logits y [n, V] of hidden states x [n, H], in place."""
        ends.change_logits(y, x, self)


def _among(group: LoraGroup, rows: Sequence[int], device: torch.device) -> LoraGroup | None:
    """The group's tokens among these, numbered as these are."""
    spans: list[tuple[int, int]] = []
    for place, row in enumerate(rows):
        if any(start <= row < stop for start, stop in group.spans):
            if spans and spans[-1][1] == place:
                spans[-1] = (spans[-1][0], place + 1)
            else:
                spans.append((place, place + 1))
    return _group(device, group.revision, group.scale, spans) if spans else None


def _group(device: torch.device, revision: Revision, scale: float, spans: list[tuple[int, int]]) -> LoraGroup:
    num_tokens = sum(stop - start for start, stop in spans)
    if len(spans) == 1:
        return LoraGroup(revision, scale, num_tokens, tuple(spans), slice(*spans[0]))
    index = [token for start, stop in spans for token in range(start, stop)]
    is_cuda = device.type == "cuda"
    rows = torch.tensor(index, dtype=torch.int64, pin_memory=is_cuda).to(device, non_blocking=True)
    return LoraGroup(revision, scale, num_tokens, tuple(spans), rows)
