"""A step as torch's attention wants it described: decode rows in groups, chunks in tiles, masks.

Nothing here reads a device tensor on the host: all sizes come from the host, and masks are made on the device
from lengths.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.model.attention import QuerySpan
from server.model.transfer import Numbers

_MASK_BYTES = 64 << 20  # bound on the mask of one tile of a chunk
_TILE_STEP = 16  # tiles begin at multiples of it from the end, which keeps their masks aligned for kernels

# One more group costs about as much as reading this many positions (2 cores, AVX-512).
_MIN_WASTE_TOKENS = 512
_MAX_WASTE_SHARE = 4  # a group may read a quarter more than its rows need


def visible_keys(
    num_queries: int,
    num_keys: int,
    window: int | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """[num_queries, num_keys] additive mask: 0 where a query sees a key, else -inf. The last query stands at
    the last key.
    """
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)[None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    mask = torch.zeros(num_queries, num_keys, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, float("-inf"))


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Batch tokens [start, stop): one query token of each of n sequences."""

    start: int
    stop: int
    blocks: Tensor  # [n * m] block ids, each row padded with its own first block
    key_start: int  # of the m * block_size gathered positions, [key_start, key_stop) are used by some row
    key_stop: int
    # [n, 1, 1, key_stop - key_start] 0 or -inf in the KV dtype; None: all rows use all of them
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Some queries of a chunk and the keys they see between them, both counted from the chunk's first."""

    start: int
    stop: int
    key_start: int
    key_stop: int  # one after the key of the last query


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Batch tokens [start, stop): consecutive query tokens of one sequence.

    Where it needs a mask, the queries are taken in tiles: 8,000 of them against 128,000 keys would need 2 GB.
    What a query sees depends only on how far from it a key is, so one mask, made for the largest tile, serves
    all tiles: each uses its lower right corner.
    """

    start: int
    stop: int
    blocks: Tensor | None  # [m] block ids; None: the sequence begins here, so its keys are all at hand
    key_start: int  # of the m * block_size gathered positions, [key_start, key_stop) are used
    key_stop: int
    window: int | None
    mask: Tensor | None  # [height, width] of a tile, 0 or -inf in the KV dtype; None: plainly causal

    @classmethod
    def masked(
        cls,
        start: int,
        stop: int,
        blocks: Tensor | None,
        key_start: int,
        key_stop: int,
        window: int | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "PrefillChunk":
        """With the mask it needs."""
        height, width = mask_shape(stop - start, key_stop - key_start, window, dtype.itemsize)
        mask = visible_keys(height, width, window, dtype=dtype, device=device)
        return cls(start, stop, blocks, key_start, key_stop, window, mask)

    def tiles(self, height: int) -> Iterator[QueryTile]:
        """The chunk in tiles of `height` queries; only the first may be smaller."""
        num_queries, num_keys = self.stop - self.start, self.key_stop - self.key_start
        before = num_keys - num_queries  # keys before that of the first query
        for stop in range(num_queries % height or height, num_queries + 1, height):
            start = max(0, stop - height)
            oldest = 0 if self.window is None else max(0, before + start - self.window + 1)
            yield QueryTile(start, stop, oldest, before + stop)


def mask_shape(num_queries: int, num_keys: int, window: int | None, item_bytes: int) -> tuple[int, int]:
    """Height and width of the largest tile of a chunk, so high that its mask stays within bounds."""
    height = max(_TILE_STEP, _MASK_BYTES // (num_keys * item_bytes) // _TILE_STEP * _TILE_STEP)
    height = min(height, num_queries)
    return height, num_keys if window is None else min(num_keys, height + window - 1)


@dataclass(frozen=True, slots=True)
class AttentionView:
    """The step as layers of one window length see it."""

    groups: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """All that attention needs to know of a step."""

    kv_index: Tensor  # [T] where each token's key and value are written
    views: Mapping[int | None, AttentionView]  # by `LayerSpec.sliding_window`


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


@dataclass(frozen=True, slots=True)
class HostBatch:
    """An AttentionBatch before the move."""

    views: Mapping[int | None, _HostView]
    keys_of: Mapping[int | None, int | None]  # the view of each window
    dtype: torch.dtype

    def to_device(self, numbers: Tensor, kv_index: Tensor) -> AttentionBatch:
        views = {window: view.to_device(numbers, self.dtype) for window, view in self.views.items()}
        return AttentionBatch(kv_index, {window: views[key] for window, key in self.keys_of.items()})


def describe_step(
    spans: Sequence[QuerySpan],
    numbers: Numbers,
    *,
    windows: Iterable[int | None],
    block_size: int,
    dtype: torch.dtype,
) -> HostBatch:
    """See `AttentionKernels.describe`. Layers share a view while nobody is longer than their window."""
    longest = max(span.start + span.num_tokens for span in spans)
    keys_of = {window: None if window is not None and window >= longest else window for window in windows}
    views = {window: _host_view(spans, window, numbers, block_size) for window in set(keys_of.values())}
    return HostBatch(views, keys_of, dtype)


def _host_view(
    queries: Sequence[QuerySpan], window: int | None, numbers: Numbers, block_size: int
) -> _HostView:
    decodes = [span for span in queries if span.num_tokens == 1]
    prefills = [span for span in queries if span.num_tokens > 1]
    spans = [_span(chunk, window, block_size) for chunk in decodes]
    groups = [_host_group(decodes[a:b], spans[a:b], a, numbers) for a, b in _group_bounds(spans, block_size)]
    chunks: list[_HostChunk] = []
    at = len(decodes)
    for chunk in prefills:
        chunks.append(_host_chunk(chunk, at, window, numbers, block_size))
        at += chunk.num_tokens
    return _HostView(tuple(groups), tuple(chunks))


@dataclass(frozen=True, slots=True)
class _Span:
    """The keys [low, high) that a chunk's queries see, counted from the first of `num_blocks` blocks read."""

    first_block: int
    num_blocks: int
    low: int
    high: int


def _span(chunk: QuerySpan, window: int | None, block_size: int) -> _Span:
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
    chunks: Sequence[QuerySpan], spans: Sequence[_Span], start: int, numbers: Numbers
) -> _HostGroup:
    width = max(span.num_blocks for span in spans)
    blocks: list[int] = []
    for chunk, span in zip(chunks, spans, strict=True):
        table = chunk.block_table
        blocks += table[span.first_block : span.first_block + span.num_blocks]
        blocks += [table[span.first_block]] * (width - span.num_blocks)
    lows, highs = [span.low for span in spans], [span.high for span in spans]
    key_start, key_stop = min(lows), max(highs)
    return _HostGroup(
        start=start,
        stop=start + len(spans),
        blocks=numbers.add(blocks),
        lows=numbers.add(lows),
        highs=numbers.add(highs),
        key_start=key_start,
        key_stop=key_stop,
        is_ragged=max(lows) > key_start or min(highs) < key_stop,
    )


def _host_chunk(
    chunk: QuerySpan, at: int, window: int | None, numbers: Numbers, block_size: int
) -> _HostChunk:
    span = _span(chunk, window, block_size)
    table = chunk.block_table[span.first_block : span.first_block + span.num_blocks]
    is_first = chunk.start == 0
    return _HostChunk(
        start=at,
        stop=at + chunk.num_tokens,
        blocks=None if is_first else numbers.add(table),
        key_start=span.low,
        key_stop=span.high,
        window=window,
        is_plain=is_first and (window is None or window >= chunk.num_tokens),
    )
