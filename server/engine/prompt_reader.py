"""What a step tells about prompts: log-probabilities of their tokens, and vectors of their hidden states.

Both are functions of the hidden states [T, H] after the final norm. Scores need logits at every position of a
chunk, V numbers each, so the head computes them a slice at a time and only what was asked of a slice is kept.
A mean is summed in float32, chunk by chunk, in the sequence itself: so it dies with the sequence, and begins
anew when a preempted one begins anew. Each kind is read by the host once a step, and only where it is asked
for.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from server.engine.input_batch import PooledRows, ScoredRows
from server.engine.logprobs import read_score, score, width
from server.engine.plan import PromptScores, PromptVector, ScoredToken
from server.engine.sequence import SequenceId
from server.model.halves import HeadRows
from server.model.transfer import to_device
from server.types import Pooling

SLICE_NUMBERS = 1 << 24  # logits computed at once: 64 MiB as float32, 110 rows of a large vocabulary


def read_scores(
    scored: Sequence[ScoredRows],
    logits_of: Callable[[HeadRows], Tensor],
    vocab_size: int,
    device: torch.device,
) -> tuple[list[PromptScores], list[SequenceId]]:
    """The scores of each, or its id among the failed ones. `logits_of` computes logits [n, V] of n rows."""
    by_count: defaultdict[int, list[ScoredRows]] = defaultdict(list)
    for item in scored:
        by_count[min(item.sequence.sampling.num_prompt_logprobs or 0, vocab_size)].append(item)
    if not by_count:
        return [], []
    in_order = [item for items in by_count.values() for item in items]
    host = [row for item in in_order for row in range(item.start, item.stop)]
    rows, ids = _on_device(host, in_order, device)
    step = max(1, SLICE_NUMBERS // vocab_size)
    parts: list[Tensor] = []
    at = 0
    for count, items in by_count.items():
        stop = at + sum(len(item.token_ids) for item in items)
        for start in range(at, stop, step):
            here = slice(start, min(start + step, stop))
            logits = logits_of(HeadRows(rows[here], host[here]))
            parts.append(score(logits, ids[here], count).flatten())
        at = stop
    return _told(by_count, torch.cat(parts).tolist())


def read_vectors(pooled: Sequence[PooledRows], hidden: Tensor) -> tuple[list[PromptVector], list[SequenceId]]:
    """The vectors of the sequences that are over, or their ids among the failed ones. `hidden` [T, H]."""
    whole: list[SequenceId] = []
    sums: list[Tensor] = []  # [H] each
    for item in pooled:
        total = _pool(item, hidden)
        if item.is_last:
            whole.append(item.sequence.id)
            sums.append(total)
        item.sequence.pooled = None if item.is_last else total
    if not whole:
        return [], []
    stacked = torch.stack(sums)  # [R, H]; a sum points where the mean points
    length = torch.linalg.vector_norm(stacked, dim=1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny  # a vector of zeros stays one
    read: list[list[float]] = torch.cat([length, stacked / length.clamp_min(tiny)], dim=1).tolist()
    vectors: list[PromptVector] = []
    failed: list[SequenceId] = []
    for sequence_id, (norm, *values) in zip(whole, read, strict=True):
        if math.isfinite(norm):
            vectors.append(PromptVector(sequence_id, tuple(values)))
        else:
            failed.append(sequence_id)
    return vectors, failed


def _pool(item: PooledRows, hidden: Tensor) -> Tensor:
    """What the sequence's chunks up to this one amount to. [H] float32"""
    if item.sequence.pooling is Pooling.LAST:
        return hidden[item.stop - 1].float()
    total = hidden[item.start : item.stop].float().sum(0)
    if item.is_first:
        return total
    before = item.sequence.pooled
    assert isinstance(before, Tensor), "the chunk before has left its sum"
    return before + total


def _on_device(rows: list[int], scored: Sequence[ScoredRows], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the batch and the token after each, in order, with one move."""
    ids = [token for item in scored for token in item.token_ids]
    both = to_device(torch.tensor([rows, ids], dtype=torch.int64), device)
    return both[0], both[1]


def _told(
    by_count: dict[int, list[ScoredRows]], numbers: list[float]
) -> tuple[list[PromptScores], list[SequenceId]]:
    """Cut what was read into rows of `score`."""
    found: list[PromptScores] = []
    failed: list[SequenceId] = []
    at = 0
    for count, items in by_count.items():
        for item in items:
            tokens: list[ScoredToken] = []
            for token_id in item.token_ids:
                tokens.append(ScoredToken(token_id, *read_score(numbers[at : at + width(count)], count)))
                at += width(count)
            if any(math.isnan(token.logprob) for token in tokens):
                failed.append(item.sequence.id)
            else:
                found.append(PromptScores(item.sequence.id, tuple(tokens)))
    return found, failed
