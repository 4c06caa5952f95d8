"""Paged attention with torch's own operators, on every device.

    layer i   keys   [num_blocks * block_size, Hk, Dk]        kv_index = block * block_size + offset
              values [num_blocks * block_size, Hk, Dv]

Decode rows of similar length are one group (`torch_step`): their blocks are gathered by `index_select` into
[n, keys], and the g query heads that share a KV head become g query rows of one SDPA call (on CPU in bfloat16
`enable_gqa` with a mask is 12 times slower). Chunks run one by one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from server.model.attention import AttentionLayer, LayerSpec, QuerySpan, StepContext
from server.model.torch_step import (
    AttentionBatch,
    AttentionView,
    DecodeGroup,
    HostBatch,
    PrefillChunk,
    describe_step,
    visible_keys,
)
from server.model.transfer import Numbers

_SCORE_TILE_BYTES = 64 << 20  # bound on the float32 scores of one tile where they have to be written out


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


class TorchAttention:
    """Implements AttentionKernels."""

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

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
    ) -> HostBatch:
        return describe_step(spans, numbers, windows=windows, block_size=block_size, dtype=dtype)


class PagedLayer(AttentionLayer):
    """Groups and chunks one after the other."""

    __slots__ = ()

    def _attend(
        self, batch: AttentionBatch, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        q, k, v = (operand.transpose(0, 1) for operand in (q, k, v))  # [T, H, D]
        self._context.keys[self._index].index_copy_(0, batch.kv_index, k)
        self._context.values[self._index].index_copy_(0, batch.kv_index, v)
        scoring = Scoring(scale, self._spec.softcap, sinks)
        view = batch.views[self._spec.sliding_window]
        if len(view.groups) + len(view.chunks) == 1:
            return self._attend_one(view, q, k, v, scoring)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])  # [T, Hq, Dv]
        for group in view.groups:
            out[group.start : group.stop] = self._decode(group, q[group.start : group.stop], scoring)
        for chunk in view.chunks:
            tokens = slice(chunk.start, chunk.stop)
            out[tokens] = self._prefill(chunk, q[tokens], k[tokens], v[tokens], scoring)
        return out

    def _attend_one(self, view: AttentionView, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        if view.groups:
            return self._decode(view.groups[0], q, scoring)
        return self._prefill(view.chunks[0], q, k, v, scoring)

    def _decode(self, group: DecodeGroup, q: Tensor, scoring: Scoring) -> Tensor:
        """q [n, Hq, Dk] -> [n, Hq, Dv], one query token a row."""
        n, num_heads, _ = q.shape
        k, v = self._gather(group.blocks, n, group.key_start, group.key_stop)  # [n, Hk, keys, D]
        packed = q.reshape(n, k.shape[1], -1, q.shape[2])  # [n, Hk, g, Dk]
        scoring = scoring.with_sinks_as((1, k.shape[1], -1, 1))
        return scoring.attend(packed, k, v, group.mask).reshape(n, num_heads, -1)

    def _prefill(self, chunk: PrefillChunk, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
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
