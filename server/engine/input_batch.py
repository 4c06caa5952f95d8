"""A StepPlan as tensors: one pass over the chunks on the host, one move to the device.

Order of the batch: chunks of one token first (decode rows), longest context first, then the others.
Everything is laid out as one list of integers, moved at once, and then cut into views. Nothing is kept from
step to step: a batch is a function of the plan.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.types import AdapterUse
from server.engine import sequence
from server.engine.plan import ScheduledChunk, StepPlan
from server.model.attention import AttentionKernels, QuerySpan
from server.model.halves import HeadRows
from server.model.transfer import Numbers


@dataclass(frozen=True, slots=True)
class InputBatch:
    """One step's input, on the device but for what the host keeps for itself."""

    input_ids: Tensor  # [T]
    positions: Tensor  # [T] position in the sequence
    last: HeadRows  # the tokens whose logits are wanted, in the order of `sampling`
    stale: Tensor | None  # positions of the KV tensors to clear before the forward; None: none
    attention: Any  # what the attention kernels made of it
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
    kernels: AttentionKernels,
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
    numbers = Numbers()
    ids, positions, kv_index, last, stale = _token_lists([*decodes, *prefills], block_size)
    cuts = [numbers.add(values) for values in (ids, positions, kv_index, last, stale)]
    spans = [QuerySpan(c.start, c.num_tokens, c.sequence.block_table) for c in (*decodes, *prefills)]
    described = kernels.describe(spans, numbers, windows=windows, block_size=block_size, dtype=dtype)
    moved = numbers.to_device(device)
    input_ids, position_ids, kv_positions, last_ids, stale_positions = (moved[cut] for cut in cuts)
    return InputBatch(
        input_ids=input_ids,
        positions=position_ids,
        last=HeadRows(last_ids, last),
        stale=stale_positions if stale else None,
        attention=described.to_device(moved, kv_positions),
        sampling=tuple(c.sequence for c in (*decodes, *prefills) if c.samples),
        scored=scored,
        pooled=pooled,
        adapter_rows=tuple(_adapter_rows((*decodes, *prefills))),
    )


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


def _adapter_rows(chunks: Iterable[ScheduledChunk]) -> Iterator[tuple[AdapterUse | None, int]]:
    """Who computes which rows. Tokens before a sequence's `adapter_start` are the base model's."""
    for chunk in chunks:
        num_before = max(0, min(chunk.sequence.adapter_start - chunk.start, chunk.num_tokens))
        if num_before:
            yield None, num_before
        if num_before < chunk.num_tokens:
            yield chunk.sequence.adapter, chunk.num_tokens - num_before


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
