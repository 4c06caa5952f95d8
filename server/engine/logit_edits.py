"""What a request asks to be changed about its logits before anything is drawn, in the documented order.

    bias         l[t] += bias
    repetition   l[t] = l[t] / p if l[t] > 0 else l[t] * p    for each t in prompt or output
    frequency    l[t] -= f * count(t)                         for each t in the output
    presence     l[t] -= p                                    for each t in the output
    bans         l[t] = -inf                                  for each t that would end a sequence before
                                                              its min_tokens

The repetition penalty is that of CTRL, arXiv:1909.05858. With a penalty window all three penalties look at
the last tokens of prompt and output instead, as llama.cpp's do. All rows' edits are collected on the host as
(row, token, value) triples and moved at once; rows that ask for nothing are not among them, and a step in
which nobody asks makes no tensor. Which tokens a sequence holds is kept with it, token by token: here it is
copied, and only the last tokens of a window are counted.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from server.engine import sequence
from server.model.transfer import to_device
from server.types import SamplingParams


def has_edits(item: sequence.Sequence) -> bool:
    """Whether this sequence's next logits are changed at all."""
    sampling = item.sampling
    return bool(sampling.logit_bias or _has_penalties(sampling) or item.num_generated < item.stop.min_tokens)


@dataclass(slots=True)
class _Entries:
    """(row, token, value) triples of one kind of edit, row by row."""

    rows: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, row: int, tokens: Tensor, values: Tensor | float) -> None:
        """`tokens` [n] int64; `values` [n] or one for all."""
        if len(tokens):
            self.rows.append(torch.full_like(tokens, row))
            self.tokens.append(tokens)
            self.values.append(torch.as_tensor(values, dtype=torch.float32).expand(len(tokens)))

    def on(self, logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The index of the entries in `logits`, and their values."""
        index = to_device(torch.stack([torch.cat(self.rows), torch.cat(self.tokens)]), logits.device)
        return (index[0], index[1]), to_device(torch.cat(self.values), logits.device)


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
            values = torch.tensor([value for _, value in known])
            bias.add(row, torch.tensor([token for token, _ in known], dtype=torch.int64), values)
        if _has_penalties(sampling):
            held, repeated, counts = _penalised(item)
            if sampling.repetition_penalty != 1.0:
                repetition.add(row, held, sampling.repetition_penalty)
            if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
                amounts = counts * sampling.frequency_penalty + sampling.presence_penalty
                counted.add(row, repeated, amounts)
        if item.num_generated < item.stop.min_tokens:
            ends = set(item.stop.stop_token_ids)
            if not item.stop.ignore_eos:
                ends.update(eos_token_ids, item.stop.eos_token_ids)
            known_ends = [token for token in ends if 0 <= token < vocab_size]
            banned.add(row, torch.tensor(known_ends, dtype=torch.int64), float("-inf"))
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


def _has_penalties(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def _penalised(item: sequence.Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that a repetition penalty is about, those that the other two are about, and how often the
    latter are there: [n] int64, [m] int64, [m] float64.
    """
    window = item.sampling.penalty_window
    if window is not None:
        recent = torch.tensor(item.tokens[-window:], dtype=torch.int64)
        tokens, times = torch.unique(recent, return_counts=True)
        return tokens, tokens, times.double()
    counts = item.token_counts
    counts.update(item.tokens, item.num_prompt)
    held, generated = _copied(counts.held, torch.int64), _copied(counts.generated, torch.int64)
    return held, generated, _copied(counts.counts, torch.float64)


def _copied(numbers: "array[Any]", dtype: torch.dtype) -> Tensor:
    """A copy: an array cannot grow while a tensor looks at its memory."""
    return torch.frombuffer(numbers, dtype=dtype).clone() if numbers else torch.empty(0, dtype=dtype)
