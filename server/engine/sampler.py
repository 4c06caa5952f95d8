"""From logits to tokens.

Order, for each row: bias, penalties, bans (`logit_edits`), temperature, top_k, top_p, min_p, draw (`draw`).
Rows without a feature cost nothing: greedy rows are one `max` over the model's own logits, and only rows with
edits are copied to be changed. What a row gets does not depend on its neighbours, on batching or on
preemption.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine import sequence
from server.engine.draw import draw
from server.engine.logit_edits import apply_edits, has_edits
from server.engine.plan import RunnerOutput, SampledToken
from server.model.transfer import to_device
from server.types import Alternative


class Sampler:
    """Draws one token for each row of logits."""

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids

    def sample(self, logits: Tensor, sequences: Sequence[sequence.Sequence]) -> RunnerOutput:
        """`logits` [B, V] of the model, row i for sequence i; not changed. One transfer to the host, two if
        some row wants logprobs. A row whose logits are not finite where it matters (NaN, or no finite
        maximum) fails.
        """
        peak, ids = logits.max(-1)  # [B]; NaN wins over everything
        is_good = peak.isfinite()
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
        logprobs = _logprobs(
            logits, ids.masked_fill(~is_good, 0), sequences
        )  # a failed row's id may be anything
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
        peak, ids = logits.max(-1)
        drawn = [row for row, item in enumerate(sequences) if not item.sampling.is_greedy]
        if drawn:
            rows = _index(drawn, logits.device)
            ids = ids.index_copy(0, rows, draw(logits[rows], peak[rows], _pick(sequences, drawn)))
        return ids, peak


def _index(rows: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(rows, dtype=torch.int64), device)


def _pick(sequences: Sequence[sequence.Sequence], rows: list[int]) -> list[sequence.Sequence]:
    return [sequences[row] for row in rows]


def _logprobs(
    logits: Tensor, ids: Tensor, sequences: Sequence[sequence.Sequence]
) -> dict[int, tuple[float, tuple[Alternative, ...]]]:
    """By row: the log-probability of its token and of the most likely ones, by the model's own distribution.

    Rows are taken by their number of alternatives, so that ties are cut for each as if it were alone.
    """
    by_count: defaultdict[int, list[int]] = defaultdict(list)
    for row, item in enumerate(sequences):
        if item.sampling.num_logprobs is not None:
            by_count[min(item.sampling.num_logprobs, logits.shape[1])].append(row)
    if not by_count:
        return {}
    parts: list[Tensor] = []
    for count, rows in by_count.items():
        index = _index(rows, logits.device)
        logprobs = logits[index].float().log_softmax(-1)
        chosen = logprobs.gather(1, ids[index, None])
        best = logprobs.topk(count, dim=-1)
        exact_ids = best.indices.double()
        parts.append(torch.cat([chosen, best.values, exact_ids], dim=1).flatten())
    numbers: list[float] = torch.cat([part.double() for part in parts]).tolist()
    found: dict[int, tuple[float, tuple[Alternative, ...]]] = {}
    at = 0
    for count, rows in by_count.items():
        for row in rows:
            chosen_value, values = numbers[at], numbers[at + 1 : at + 1 + count]
            tokens = numbers[at + 1 + count : at + 1 + 2 * count]
            alternatives = tuple(Alternative(int(t), v) for t, v in zip(tokens, values, strict=True))
            found[row] = (chosen_value, alternatives)
            at += 1 + 2 * count
    return found
