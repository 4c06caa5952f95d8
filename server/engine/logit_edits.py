"""What a request asks to be changed about its logits before anything is drawn, in the documented order.

    logit_bias    l[t] += bias
    repetition    l[t] = l[t] / p if l[t] > 0 else l[t] * p, for t in prompt and output   (CTRL,
    arXiv:1909.05858) frequency     l[t] -= f * count(t), for t in the output presence      l[t] -= p, for t
    in the output bans          l[t] = -inf for every token that would end a sequence before its min_tokens

All rows' edits are collected as (row, token, value) triples on the host and moved at once; rows that ask for
nothing are not in the lists, and a step in which nobody asks makes no tensor.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.engine import sequence
from server.types import SamplingParams


def has_edits(item: sequence.Sequence) -> bool:
    """Whether this sequence's next logits are changed at all."""
    sampling = item.sampling
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
        or item.num_generated < item.stop.min_tokens
    )


@dataclass(slots=True)
class _Entries:
    """(row, token, value) triples of one kind of edit."""

    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, row: int, tokens: Sequence[int], values: Sequence[float]) -> None:
        self.rows += [row] * len(tokens)
        self.tokens += tokens
        self.values += values

    def on(self, logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The index of the entries in `logits`, and their values."""
        index = torch.tensor([self.rows, self.tokens], dtype=torch.int64).to(logits.device, non_blocking=True)
        values = torch.tensor(self.values, dtype=torch.float32).to(logits.device, non_blocking=True)
        return (index[0], index[1]), values


def apply_edits(
    logits: Tensor, sequences: Sequence[sequence.Sequence], vocab_size: int, eos_token_ids: frozenset[int]
) -> None:
    """Change `logits` [rows, >= vocab_size] float32 in place; row i belongs to sequence i. Token ids beyond
    the vocabulary are ignored.
    """
    bias, repetition, counted, banned = _Entries(), _Entries(), _Entries(), _Entries()
    for row, item in enumerate(sequences):
        sampling = item.sampling
        if sampling.logit_bias:
            known = [(token, value) for token, value in sampling.logit_bias if 0 <= token < vocab_size]
            bias.add(row, [token for token, _ in known], [value for _, value in known])
        if sampling.repetition_penalty != 1.0:
            seen = list(set(item.tokens))
            repetition.add(row, seen, [sampling.repetition_penalty] * len(seen))
        if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
            counts = Counter(item.tokens[item.num_prompt :])
            counted.add(row, list(counts), [_penalty(sampling, count) for count in counts.values()])
        if item.num_generated < item.stop.min_tokens:
            ends = set(item.stop.stop_token_ids) | (frozenset() if item.stop.ignore_eos else eos_token_ids)
            known_ends = [token for token in ends if 0 <= token < vocab_size]
            banned.add(row, known_ends, [float("-inf")] * len(known_ends))
    if bias.rows:
        at, values = bias.on(logits)
        logits.index_put_(at, values, accumulate=True)
    if repetition.rows:
        at, values = repetition.on(logits)
        current = logits[at]
        logits.index_put_(at, torch.where(current > 0, current / values, current * values))
    if counted.rows:
        at, values = counted.on(logits)
        logits.index_put_(at, -values, accumulate=True)
    if banned.rows:
        at, values = banned.on(logits)
        logits.index_put_(at, values)


def _penalty(sampling: SamplingParams, count: int) -> float:
    return sampling.frequency_penalty * count + sampling.presence_penalty
