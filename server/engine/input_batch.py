"""A StepPlan as tensors: one pass over the chunks on the host, one move to the device.

Order of the batch: chunks of one token first (decode rows), longest context first, then the others.
Everything is laid out as one list of integers, moved at once, and then cut into views; masks are made on the
device from lengths. Nothing is kept from step to step: a batch is a function of the plan.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.types import AdapterUse
from server.engine import sequence
from server.engine.plan import ScheduledChunk, StepPlan
from server.model.attention import AttentionBatch, AttentionView, DecodeGroup, PrefillChunk
from server.model.halves import HeadRows
from server.model.transfer import to_device

# One more group costs about as much as reading this many positions (2 cores, AVX-512).
_MIN_WASTE_TOKENS = 512
_MAX_WASTE_SHARE = 4  # a group may read a quarter more than its rows need


@dataclass(frozen=True, slots=True)
class InputBatch:
    """One step's input, on the device but for what the host keeps for itself."""

    input_ids: Tensor  # [T]
    positions: Tensor  # [T] position in the sequence
    last: HeadRows  # the tokens whose logits are wanted, in the order of `sampling`
    stale: Tensor | None  # positions of the KV tensors to clear before the forward; None: none
    attention: AttentionBatch
    sampling: tuple[sequence.Sequence, ...]  # the sequences that are to get a token
    scored: tuple["ScoredRows", ...]
    pooled: tuple["PooledRows", ...]
    adapter_rows: tuple[tuple[AdapterUse | None, int], ...]  # (adapters, number of tokens) in batch order


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Rows [start, stop) of the batch, whose logits are wanted for the tokens that follow them."""

    sequence: sequence.Sequence
    start: int
    stop: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PooledRows:
    """Rows [start, stop) of the batch: all of a chunk of a sequence that becomes a vector."""

    sequence: sequence.Sequence
    start: int
    stop: int
    is_first: bool
    is_last: bool


def build_input_batch(
    plan: StepPlan,
    *,
    windows: Iterable[int | None],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> InputBatch:
    """`windows` are the distinct sliding windows of the layers; `dtype` is that of the KV tensors."""
    decodes = sorted((c for c in plan.chunks if c.num_tokens == 1), key=lambda c: c.start, reverse=True)
    prefills = [c for c in plan.chunks if c.num_tokens > 1]
    scored, pooled = _prompt_rows((*decodes, *prefills))
    layout = _Layout(block_size)
    ids, positions, kv_index, last, stale = _token_lists([*decodes, *prefills], block_size)
    cuts = [layout.add(values) for values in (ids, positions, kv_index, last, stale)]
    views: dict[int | None, _HostView] = {}
    longest = max(c.start + c.num_tokens for c in plan.chunks)
    keys_of = {window: None if window is not None and window >= longest else window for window in windows}
    for window in set(keys_of.values()):
        views[window] = _host_view(decodes, prefills, window, layout)
    numbers = layout.to_device(device)
    input_ids, position_ids, kv_positions, last_ids, stale_positions = (numbers[cut] for cut in cuts)
    on_device = {window: view.to_device(numbers, dtype) for window, view in views.items()}
    return InputBatch(
        input_ids=input_ids,
        positions=position_ids,
        last=HeadRows(last_ids, last),
        stale=stale_positions if stale else None,
        attention=AttentionBatch(kv_positions, {window: on_device[key] for window, key in keys_of.items()}),
        sampling=tuple(c.sequence for c in (*decodes, *prefills) if c.samples),
        scored=scored,
        pooled=pooled,
        adapter_rows=tuple((c.sequence.adapter, c.num_tokens) for c in (*decodes, *prefills)),
    )


class _Layout:
    """The one list of integers that goes to the device."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._numbers: list[int] = []

    def add(self, values: Sequence[int]) -> slice:
        start = len(self._numbers)
        self._numbers.extend(values)
        return slice(start, len(self._numbers))

    def to_device(self, device: torch.device) -> Tensor:
        return to_device(torch.tensor(self._numbers, dtype=torch.int64), device)


def _token_lists(
    chunks: Sequence[ScheduledChunk], block_size: int
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Token ids, positions, KV positions, batch indices of the sampling tokens, KV positions to clear."""
    ids: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    last: list[int] = []
    stale: list[int] = []
    for chunk in chunks:
        table, start, stop = chunk.sequence.block_table, chunk.start, chunk.start + chunk.num_tokens
        ids += chunk.sequence.tokens[start:stop]
        positions += range(start, stop)
        kv_index += [table[p // block_size] * block_size + p % block_size for p in range(start, stop)]
        if chunk.samples:
            last.append(len(ids) - 1)
        begin = stop - stop % block_size  # of the block that stays partly empty
        if begin >= start and begin < stop:
            first = table[begin // block_size] * block_size
            stale += range(first + stop - begin, first + block_size)
    return ids, positions, kv_index, last, stale


def _prompt_rows(
    chunks: Sequence[ScheduledChunk],
) -> tuple[tuple[ScoredRows, ...], tuple[PooledRows, ...]]:
    """What is asked about prompts, in the order of the batch."""
    scored: list[ScoredRows] = []
    pooled: list[PooledRows] = []
    at = 0
    for chunk in chunks:
        item = chunk.sequence
        if item.is_unscored and (wanted := chunk.scored):
            first = at + wanted.start - chunk.start
            token_ids = tuple(item.tokens[wanted.start + 1 : wanted.stop + 1])
            scored.append(ScoredRows(item, first, first + len(wanted), token_ids))
        if item.pooling is not None:
            pooled.append(PooledRows(item, at, at + chunk.num_tokens, chunk.start == 0, chunk.is_last))
        at += chunk.num_tokens
    return tuple(scored), tuple(pooled)


@dataclass(frozen=True, slots=True)
class _HostGroup:
    """A DecodeGroup before the move; `lows` and `highs` bound each row's keys within its gathered blocks."""

    start: int
    stop: int
    blocks: slice
    lows: slice
    highs: slice
    key_start: int
    key_stop: int
    is_ragged: bool

    def to_device(self, numbers: Tensor, dtype: torch.dtype) -> DecodeGroup:
        mask = None
        if self.is_ragged:
            keys = torch.arange(self.key_start, self.key_stop, device=numbers.device)
            lows, highs = numbers[self.lows, None], numbers[self.highs, None]
            hidden = (keys < lows) | (keys >= highs)  # [n, keys]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=numbers.device)
            mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        return DecodeGroup(self.start, self.stop, numbers[self.blocks], self.key_start, self.key_stop, mask)


@dataclass(frozen=True, slots=True)
class _HostChunk:
    """A PrefillChunk before the move."""

    start: int
    stop: int
    blocks: slice | None
    key_start: int
    key_stop: int
    window: int | None
    is_plain: bool

    def to_device(self, numbers: Tensor, dtype: torch.dtype) -> PrefillChunk:
        blocks = None if self.blocks is None else numbers[self.blocks]
        place = (self.start, self.stop, blocks, self.key_start, self.key_stop, self.window)
        if self.is_plain:
            return PrefillChunk(*place, mask=None)
        return PrefillChunk.masked(*place, dtype=dtype, device=numbers.device)


@dataclass(frozen=True, slots=True)
class _HostView:
    groups: tuple[_HostGroup, ...]
    chunks: tuple[_HostChunk, ...]

    def to_device(self, numbers: Tensor, dtype: torch.dtype) -> AttentionView:
        return AttentionView(
            tuple(group.to_device(numbers, dtype) for group in self.groups),
            tuple(chunk.to_device(numbers, dtype) for chunk in self.chunks),
        )


def _host_view(
    decodes: Sequence[ScheduledChunk], prefills: Sequence[ScheduledChunk], window: int | None, layout: _Layout
) -> _HostView:
    spans = [_span(chunk, window, layout.block_size) for chunk in decodes]
    groups = [
        _host_group(decodes[a:b], spans[a:b], a, layout) for a, b in _group_bounds(spans, layout.block_size)
    ]
    chunks: list[_HostChunk] = []
    at = len(decodes)
    for chunk in prefills:
        chunks.append(_host_chunk(chunk, at, window, layout))
        at += chunk.num_tokens
    return _HostView(tuple(groups), tuple(chunks))


@dataclass(frozen=True, slots=True)
class _Span:
    """The keys [low, high) that a chunk's queries see, counted from the first of `num_blocks` blocks read."""

    first_block: int
    num_blocks: int
    low: int
    high: int


def _span(chunk: ScheduledChunk, window: int | None, block_size: int) -> _Span:
    length = chunk.start + chunk.num_tokens
    oldest = 0 if window is None else max(0, chunk.start - window + 1)
    first_block = oldest // block_size
    base = first_block * block_size
    return _Span(first_block, -(-length // block_size) - first_block, oldest - base, length - base)


def _group_bounds(spans: Sequence[_Span], block_size: int) -> list[tuple[int, int]]:
    """Cut rows, longest first, where padding them to the first of their group would cost more than a cut."""
    bounds: list[tuple[int, int]] = []
    start = waste = used = 0
    for i, span in enumerate(spans):
        padding = (max(0, spans[start].num_blocks - span.num_blocks)) * block_size
        used += span.num_blocks * block_size
        if i > start and waste + padding > max(_MIN_WASTE_TOKENS, used // _MAX_WASTE_SHARE):
            bounds.append((start, i))
            start, waste, used = i, 0, span.num_blocks * block_size
        else:
            waste += padding
    if spans:
        bounds.append((start, len(spans)))
    return bounds


def _host_group(
    chunks: Sequence[ScheduledChunk], spans: Sequence[_Span], start: int, layout: _Layout
) -> _HostGroup:
    width = max(span.num_blocks for span in spans)
    blocks: list[int] = []
    for chunk, span in zip(chunks, spans, strict=True):
        table = chunk.sequence.block_table
        blocks += table[span.first_block : span.first_block + span.num_blocks]
        blocks += [table[span.first_block]] * (width - span.num_blocks)
    lows, highs = [span.low for span in spans], [span.high for span in spans]
    key_start, key_stop = min(lows), max(highs)
    return _HostGroup(
        start=start,
        stop=start + len(spans),
        blocks=layout.add(blocks),
        lows=layout.add(lows),
        highs=layout.add(highs),
        key_start=key_start,
        key_stop=key_stop,
        is_ragged=max(lows) > key_start or min(highs) < key_stop,
    )


def _host_chunk(chunk: ScheduledChunk, at: int, window: int | None, layout: _Layout) -> _HostChunk:
    span = _span(chunk, window, layout.block_size)
    table = chunk.sequence.block_table[span.first_block : span.first_block + span.num_blocks]
    is_first = chunk.start == 0
    return _HostChunk(
        start=at,
        stop=at + chunk.num_tokens,
        blocks=None if is_first else layout.add(table),
        key_start=span.low,
        key_stop=span.high,
        window=window,
        is_plain=is_first and (window is None or window >= chunk.num_tokens),
    )
