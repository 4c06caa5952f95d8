"""An adapter's run: how its pieces are laid out, and the same pieces as tensors, wherever the run lies.

    run   | A of target 3 | B of target 3 | A of target 7 | B of target 7 | gain of 7 | token ids | rows |
            [r, in]         [r, out]        in model order; every piece begins at a multiple of 64 bytes

Every piece has the size that its module really needs; what an adapter does not have takes no room. B lies
column by column, because kernels add up its columns. A run is bytes to those who place and copy it. Ids of
tokens are 64-bit integers among numbers of the served dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.placement import ALIGNMENT_BYTES
from adapters.types import LoraEntry, TargetId, TargetKind, TokenRowsEntry

_ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class RunLayout:
    """What lies where in a run."""

    entries: Mapping[TargetId, LoraEntry]  # in the order of the run
    token_rows: tuple[TokenRowsEntry, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What an adapter changes of one target: y += gain * y + B (A x) + bias, where y is the base's answer."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank], column by column; all scales are in it
    gain: Tensor | None = None  # [out], DoRA's factor of each output less one
    bias: Tensor | None = None  # [out]


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows of the embedding or the head that stand in place of the base's."""

    ids: Tensor  # int64 [k], ascending
    rows: Tensor  # [k, width]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterViews:
    """All that an adapter has, as views of its run. Made once, because a layer must not have to."""

    linears: Mapping[TargetId, Terms]
    embedding: Terms | None = None
    embedding_rows: TokenRows | None = None
    head: Terms | None = None
    head_rows: TokenRows | None = None

    @property
    def changes_head(self) -> bool:
        return self.head is not None or self.head_rows is not None


Pair = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank]."""


def make_pair(run: Tensor, entry: LoraEntry) -> Pair:
    """A and B alone."""
    a = _piece(run, entry.offset_a, entry.rank * entry.in_features)
    b = _piece(run, entry.offset_b, entry.out_features * entry.rank).view(entry.rank, entry.out_features).t()
    if entry.kind is TargetKind.EMBEDDING:
        return a.view(entry.in_features, entry.rank).t(), b
    return a.view(entry.rank, entry.in_features), b


def make_terms(run: Tensor, entry: LoraEntry) -> Terms:
    """Views of what the run has for a target."""
    a, b = make_pair(run, entry)
    gain, bias = (
        None if offset is None else _piece(run, offset, entry.out_features)
        for offset in (entry.offset_gain, entry.offset_bias)
    )
    return Terms(a, b, gain, bias)


def make_token_rows(run: Tensor, entry: TokenRowsEntry) -> TokenRows:
    """Views of the ids and of the rows."""
    num_elements = entry.num_rows * _ID_BYTES // run.element_size()
    ids = _piece(run, entry.offset_ids, num_elements).view(torch.int64)
    rows = _piece(run, entry.offset_rows, entry.num_rows * entry.width)
    return TokenRows(ids, rows.view(entry.num_rows, entry.width))


def make_views(run: Tensor, layout: RunLayout) -> AdapterViews:
    """`run` is the adapter's run, wherever it lies."""
    ends = {
        entry.kind: make_terms(run, entry)
        for entry in layout.entries.values()
        if entry.kind is not TargetKind.LINEAR
    }
    rows = {entry.kind: make_token_rows(run, entry) for entry in layout.token_rows}
    return AdapterViews(
        linears={
            target: make_terms(run, entry)
            for target, entry in layout.entries.items()
            if entry.kind is TargetKind.LINEAR
        },
        embedding=ends.get(TargetKind.EMBEDDING),
        embedding_rows=rows.get(TargetKind.EMBEDDING),
        head=ends.get(TargetKind.HEAD),
        head_rows=rows.get(TargetKind.HEAD),
    )


class RunPlacer:
    """Gives each piece of a run its place, one after the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._item_bytes = dtype.itemsize
        self.num_bytes = 0

    def place(self, num_elements: int) -> int:
        """Room for numbers of the run's dtype; its offset in elements."""
        return self._take(num_elements * self._item_bytes)

    def place_ids(self, num_ids: int) -> int:
        """Room for ids of tokens; its offset in elements of the run's dtype."""
        return self._take(num_ids * _ID_BYTES)

    def _take(self, num_bytes: int) -> int:
        offset = self.num_bytes // self._item_bytes
        self.num_bytes += num_bytes + -num_bytes % ALIGNMENT_BYTES
        return offset


def _piece(run: Tensor, offset: int, num_elements: int) -> Tensor:
    return run.narrow(0, offset, num_elements)
