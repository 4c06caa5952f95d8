"""Paged attention with torch's own operators, on every device.

    layer i   keys   [num_blocks * block_size, Hk, Dk]        kv_index = block * block_size + offset
              values [num_blocks * block_size, Hk, Dv]

Decode rows of similar length are one group: their blocks are gathered by `index_select` into [n, keys] and
the g query heads that share a KV head become g query rows of one SDPA call (on CPU in bfloat16 `enable_gqa`
with a mask is 12 times slower). Chunks run one by one. Nothing here reads a device tensor on the host: all
sizes come from the host, and masks are made on the device from lengths.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from server.model.attention import LayerSpec, QuerySpan, StepContext
from server.model.transfer import Numbers

_SCORE_TILE_BYTES = 64 << 20  # bound on the float32 scores of one tile where they have to be written out
_MASK_BYTES = 64 << 20  # bound on the mask of one tile of a chunk
_TILE_STEP = 16  # tiles begin at multiples of it from the end, which keeps their masks aligned for kernels

# One more group costs about as much as reading this many positions (2 cores, AVX-512).
_MIN_WASTE_TOKENS = 512
_MAX_WASTE_SHARE = 4  # a group may read a quarter more than its rows need


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores become weights: softmax(scaling * q k^T, softly capped, with sinks beside the keys)."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None  # one logit a query head, in any shape that broadcasts to [N, H, n, 1]

    def with_sinks_as(self, shape: tuple[int, int, int, int]) -> "Scoring":
        return self if self.sinks is None else replace(self, sinks=self.sinks.view(shape))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool = False
    ) -> Tensor:
        """q [N, H, n, Dk], k [N, H, keys, Dk], v [N, H, keys, Dv], mask broadcastable to [N, H, n, keys]
        -> [N, H, n, Dv]. `is_causal` needs n == keys and no mask."""
        if self.softcap is None and self.sinks is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scaling
            )
        tile = max(1, _SCORE_TILE_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
        if not is_causal and (mask is None or mask.shape[-2] == 1 or q.shape[2] <= tile):
            return self._attend_written_out(q, k, v, mask)
        parts: list[Tensor] = []
        for start in range(0, q.shape[2], tile):
            queries, stop = q[:, :, start : start + tile], min(start + tile, q.shape[2])
            if is_causal:
                part = visible_keys(stop - start, stop, None, dtype=q.dtype, device=q.device)
                parts.append(self._attend_written_out(queries, k[:, :, :stop], v[:, :, :stop], part))
            elif mask is not None:
                parts.append(self._attend_written_out(queries, k, v, mask[..., start:stop, :]))
        return torch.cat(parts, dim=2)

    def _attend_written_out(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The same with the scores in memory, in float32: SDPA knows neither a cap nor sinks."""
        scores = torch.matmul(q, k.transpose(2, 3)).float() * self.scaling  # [N, H, n, keys]
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores + mask
        if self.sinks is None:
            return torch.matmul(scores.softmax(-1).to(v.dtype), v)
        sinks = self.sinks.float().expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        return torch.matmul(weights.to(v.dtype), v)


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


class TorchAttention:
    """Implements AttentionKernels."""

    def shapes(
        self, layer: LayerSpec, num_blocks: int, block_size: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        positions = num_blocks * block_size, layer.num_kv_heads
        return (*positions, layer.key_dim), (*positions, layer.value_dim)

    def clear(self, cache: Tensor, positions: Tensor) -> None:
        cache.index_fill_(0, positions, 0.0)

    def layer(self, index: int, spec: LayerSpec, context: StepContext) -> "PagedLayer":
        return PagedLayer(index, spec, context)

    def describe(
        self,
        spans: Sequence[QuerySpan],
        numbers: Numbers,
        *,
        windows: Iterable[int | None],
        block_size: int,
        dtype: torch.dtype,
    ) -> "_HostBatch":
        longest = max(span.start + span.num_tokens for span in spans)
        keys_of = {window: None if window is not None and window >= longest else window for window in windows}
        layout = _Layout(numbers, block_size)
        views = {window: _host_view(spans, window, layout) for window in set(keys_of.values())}
        return _HostBatch(views, keys_of, dtype)


class PagedLayer:
    """One attention layer of one engine."""

    __slots__ = ("_context", "_index", "_spec")

    def __init__(self, index: int, spec: LayerSpec, context: StepContext) -> None:
        self._index = index
        self._spec = spec
        self._context = context

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        sinks: Tensor | None,
        **seen: Any,
    ) -> Tensor:
        """Write the step's keys and values, then attend. Never synchronises with the device.

        query [1, Hq, T, Dk], key [1, Hk, T, Dk], value [1, Hk, T, Dv], keys already rotated; returns [1, T,
        Hq, Dv].
        """
        context = self._context
        batch = context.batch
        if batch is None:
            raise RuntimeError("the model was called outside a step")
        keys, values = context.keys[self._index], context.values[self._index]
        # [T, H, D]; the casts do nothing except in models whose norms leave keys in float32
        q = query[0].transpose(0, 1).to(keys.dtype)
        k = key[0].transpose(0, 1).to(keys.dtype)
        v = value[0].transpose(0, 1).to(values.dtype)
        keys.index_copy_(0, batch.kv_index, k)
        values.index_copy_(0, batch.kv_index, v)
        scoring = Scoring(q.shape[-1] ** -0.5 if scaling is None else scaling, self._spec.softcap, sinks)
        view = batch.views[self._spec.sliding_window]
        if len(view.groups) + len(view.chunks) == 1:
            out = self._attend_one(view, q, k, v, scoring)
        else:
            out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])  # [T, Hq, Dv]
            for group in view.groups:
                out[group.start : group.stop] = self._decode(group, q[group.start : group.stop], scoring)
            for chunk in view.chunks:
                tokens = slice(chunk.start, chunk.stop)
                out[tokens] = self._prefill(chunk, q[tokens], k[tokens], v[tokens], scoring)
        return out[None].to(query.dtype)

    def _attend_one(self, view: AttentionView, q: Tensor, k: Tensor, v: Tensor, scoring: "Scoring") -> Tensor:
        if view.groups:
            return self._decode(view.groups[0], q, scoring)
        return self._prefill(view.chunks[0], q, k, v, scoring)

    def _decode(self, group: DecodeGroup, q: Tensor, scoring: "Scoring") -> Tensor:
        """q [n, Hq, Dk] -> [n, Hq, Dv], one query token a row."""
        n, num_heads, _ = q.shape
        k, v = self._gather(group.blocks, n, group.key_start, group.key_stop)  # [n, Hk, keys, D]
        packed = q.reshape(n, k.shape[1], -1, q.shape[2])  # [n, Hk, g, Dk]
        scoring = scoring.with_sinks_as((1, k.shape[1], -1, 1))
        return scoring.attend(packed, k, v, group.mask).reshape(n, num_heads, -1)

    def _prefill(self, chunk: PrefillChunk, q: Tensor, k: Tensor, v: Tensor, scoring: "Scoring") -> Tensor:
        """q [n, Hq, Dk], k [n, Hk, Dk], v [n, Hk, Dv] -> [n, Hq, Dv], n tokens of one sequence."""
        if chunk.blocks is None:
            k, v = k.transpose(0, 1), v.transpose(0, 1)  # [Hk, n, D]
        else:
            gathered = self._gather(chunk.blocks, 1, chunk.key_start, chunk.key_stop)
            k, v = gathered[0][0], gathered[1][0]  # [Hk, keys, D]
        num_tokens, num_heads, num_kv_heads = q.shape[0], q.shape[1], k.shape[0]
        group = num_heads // num_kv_heads
        # KV heads take the batch place, the queries that share one take the head place: no keys are copied
        grouped = q.transpose(0, 1).reshape(num_kv_heads, group, num_tokens, -1)  # [Hk, g, n, Dk]
        k = k[:, None].expand(-1, group, -1, -1)
        v = v[:, None].expand(-1, group, -1, -1)
        scoring = scoring.with_sinks_as((num_kv_heads, group, 1, 1))
        if chunk.mask is None:
            out = scoring.attend(grouped, k, v, None, is_causal=True)  # [Hk, g, n, Dv]
        else:
            out = _attend_in_tiles(chunk, chunk.mask, grouped, k, v, scoring)
        return out.reshape(num_heads, num_tokens, -1).transpose(0, 1)

    def _gather(self, blocks: Tensor, num_rows: int, key_start: int, key_stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `num_rows` equally long block tables, [n, Hk, key_stop - key_start, D]."""
        size = self._context.block_size
        gathered = []
        for cache in (self._context.keys[self._index], self._context.values[self._index]):
            num_heads, dim = cache.shape[1:]
            picked = cache.view(-1, size * num_heads * dim).index_select(0, blocks)
            rows = picked.view(num_rows, -1, num_heads, dim)[:, key_start:key_stop]
            gathered.append(rows.transpose(1, 2))
        return gathered[0], gathered[1]


def _attend_in_tiles(
    chunk: PrefillChunk, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring
) -> Tensor:
    """q [Hk, g, n, Dk], k [Hk, g, keys, Dk], v [Hk, g, keys, Dv] -> [Hk, g, n, Dv]."""
    parts: list[Tensor] = []
    for tile in chunk.tiles(len(mask)):
        keys = slice(tile.key_start, tile.key_stop)
        corner = mask[len(mask) - tile.stop + tile.start :, mask.shape[1] - tile.key_stop + tile.key_start :]
        parts.append(scoring.attend(q[:, :, tile.start : tile.stop], k[:, :, keys], v[:, :, keys], corner))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where numbers go, and the size of the blocks that they tell of."""

    _numbers: Numbers
    block_size: int

    def add(self, values: Sequence[int]) -> slice:
        return self._numbers.add(values)


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
class _HostBatch:
    """An AttentionBatch before the move."""

    views: Mapping[int | None, _HostView]
    keys_of: Mapping[int | None, int | None]  # the view of each window
    dtype: torch.dtype

    def to_device(self, numbers: Tensor, kv_index: Tensor) -> AttentionBatch:
        views = {window: view.to_device(numbers, self.dtype) for window, view in self.views.items()}
        return AttentionBatch(kv_index, {window: views[key] for window, key in self.keys_of.items()})


def _host_view(queries: Sequence[QuerySpan], window: int | None, layout: _Layout) -> _HostView:
    decodes = [span for span in queries if span.num_tokens == 1]
    prefills = [span for span in queries if span.num_tokens > 1]
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
    chunks: Sequence[QuerySpan], spans: Sequence[_Span], start: int, layout: _Layout
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
        blocks=layout.add(blocks),
        lows=layout.add(lows),
        highs=layout.add(highs),
        key_start=key_start,
        key_stop=key_stop,
        is_ragged=max(lows) > key_start or min(highs) < key_stop,
    )


def _host_chunk(chunk: QuerySpan, at: int, window: int | None, layout: _Layout) -> _HostChunk:
    span = _span(chunk, window, layout.block_size)
    table = chunk.block_table[span.first_block : span.first_block + span.num_blocks]
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
