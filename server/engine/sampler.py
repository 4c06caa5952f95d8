"""From logits to tokens.

Order, for each row: bias, penalties, bans (`logit_edits`), temperature, top_k, top_p, min_p, typical_p, draw
(`draw`).
Rows without a feature cost nothing: of greedy rows the largest of the model's own logits is looked for, and
only rows with edits are copied to be changed. What a row gets does not depend on its neighbours, on batching
or on preemption.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine import sequence
from server.engine.draw import draw
from server.engine.logit_edits import apply_edits, has_edits
from server.engine.logprobs import logprobs_of_rows
from server.engine.plan import RunnerOutput, SampledToken
from server.model.native.bindings import NativeKernels
from server.model.transfer import to_device

_PIECE = 4096  # logits


class Sampler:
    """Draws one token for each row of logits."""

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], kernels: NativeKernels | None = None
    ) -> None:
        """`kernels`: our own, if the model is computed with them."""
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._kernels = kernels

    def sample(self, logits: Tensor, sequences: Sequence[sequence.Sequence]) -> RunnerOutput:
        """`logits` [B, V] of the model, row i for sequence i; not changed. One transfer to the host, two if
        some row wants logprobs. A row whose logits are not finite where it matters (NaN, or no finite
        maximum) fails.
        """
        peak, ids = largest(logits, self._kernels)
        is_good = peak.abs() < math.inf  # nor is NaN
        edited = [row for row, item in enumerate(sequences) if has_edits(item)]
        if edited:
            rows = _index(edited, logits.device)
            changed, changed_peak = self._edit_and_choose(logits[rows].float(), _pick(sequences, edited))
            ids = ids.index_copy(0, rows, changed)
            is_good = is_good.index_copy(0, rows, changed_peak.isfinite() & is_good[rows])
        drawn = [
            row for row, item in enumerate(sequences) if not (item.sampling.is_greedy or has_edits(item))
        ]
        if drawn:
            rows = _index(drawn, logits.device)
            chosen = logits if len(drawn) == len(sequences) else logits[rows]
            ids = ids.index_copy(0, rows, draw(chosen, peak[rows], _pick(sequences, drawn)))
        # masked_fill and not where: a number given to `where` is itself copied to the device, and waited for
        ids_host: list[int] = ids.masked_fill(~is_good, -1).tolist()
        failed = tuple(item.id for item, token in zip(sequences, ids_host, strict=True) if token < 0)
        wanted = [item.sampling.num_logprobs for item in sequences]
        logprobs = {}
        if any(count is not None for count in wanted):  # a failed row's id may be any
            logprobs = logprobs_of_rows(logits, ids.masked_fill(~is_good, 0), wanted)
        tokens = tuple(
            SampledToken(item.id, token, *logprobs.get(row, ()))
            for row, (item, token) in enumerate(zip(sequences, ids_host, strict=True))
            if token >= 0
        )
        return RunnerOutput(tokens, failed)

    def _edit_and_choose(
        self, logits: Tensor, sequences: Sequence[sequence.Sequence]
    ) -> tuple[Tensor, Tensor]:
        """Ids and largest logits, [R] each, of rows with edits. `logits` [R, V] float32 are overwritten."""
        apply_edits(logits, sequences, self._vocab_size, self._eos_token_ids)
        peak, ids = largest(logits)
        drawn = [row for row, item in enumerate(sequences) if not item.sampling.is_greedy]
        if drawn:
            rows = _index(drawn, logits.device)
            ids = ids.index_copy(0, rows, draw(logits[rows], peak[rows], _pick(sequences, drawn)))
        return ids, peak


def largest(logits: Tensor, kernels: NativeKernels | None = None) -> tuple[Tensor, Tensor]:
    """The largest of each row [B, V] and the first place where it is, [B] each. NaN wins over everything.

    By our own kernels, where they know such numbers. Elsewhere `max` on a CPU takes bfloat16 one number after
    the other, and `amax` does not: so the piece that holds the largest is found first (16 rows of 152,000:
    0.4 instead of 1.0 ms).
    """
    if kernels is not None and logits.dtype is kernels.dtype:
        return kernels.largest(logits)
    size = logits.shape[1]
    if logits.device.type != "cpu" or size < 2 * _PIECE:
        peak, ids = logits.max(-1)
        return peak, ids
    pieces = logits[:, : size // _PIECE * _PIECE].view(len(logits), -1, _PIECE)
    peaks = torch.cat((pieces.amax(-1), logits[:, -_PIECE:].amax(-1, keepdim=True)), 1)
    starts = peaks.max(-1).indices.mul(_PIECE).clamp(max=size - _PIECE)  # the last piece ends with the row
    places = starts[:, None] + torch.arange(_PIECE)
    peak, offsets = logits.gather(1, places).max(-1)
    return peak, starts + offsets


def _index(rows: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(rows, dtype=torch.int64), device)


def _pick(sequences: Sequence[sequence.Sequence], rows: list[int]) -> list[sequence.Sequence]:
    return [sequences[row] for row in rows]
