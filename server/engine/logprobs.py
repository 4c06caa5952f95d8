"""Log-probabilities by the model's own distribution, before anything a request asks of it.

Log-softmax in float32 over the whole vocabulary. A row's numbers do not depend on its neighbours: rows are
taken by their number of alternatives, so that ties are cut for each as if it were alone.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from server.model.transfer import to_device
from server.types import Alternative

Found = tuple[float, tuple[Alternative, ...]]
"""The log-probability of a token, and the most likely tokens in its place, best first."""


def logprobs_of_rows(logits: Tensor, ids: Tensor, num_alternatives: Sequence[int | None]) -> dict[int, Found]:
    """By row, of those that ask: what they ask. `logits` [R, V], `ids` [R]. One transfer to the host."""
    by_count: defaultdict[int, list[int]] = defaultdict(list)
    for row, count in enumerate(num_alternatives):
        if count is not None:
            by_count[min(count, logits.shape[1])].append(row)
    if not by_count:
        return {}
    parts: list[Tensor] = []
    for count, rows in by_count.items():
        index = to_device(torch.tensor(rows, dtype=torch.int64), logits.device)
        parts.append(score(logits[index], ids[index], count).flatten())
    numbers: list[float] = torch.cat(parts).tolist()
    found: dict[int, Found] = {}
    at = 0
    for count, rows in by_count.items():
        for row in rows:
            found[row] = read_score(numbers[at : at + width(count)], count)
            at += width(count)
    return found


def score(logits: Tensor, ids: Tensor, count: int) -> Tensor:
    """[R, V], [R] -> [R, width(count)] float64: the log-probability of each row's id, then those of the
    `count` most likely tokens, then their ids.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, ids[:, None])
    best = logprobs.topk(count, dim=-1)
    return torch.cat([chosen.double(), best.values.double(), best.indices.double()], dim=1)


def width(count: int) -> int:
    """Numbers in a row of `score`."""
    return 1 + 2 * count


def read_score(numbers: Sequence[float], count: int) -> Found:
    """One row of `score`, on the host."""
    values, tokens = numbers[1 : 1 + count], numbers[1 + count :]
    return numbers[0], tuple(Alternative(int(t), v) for t, v in zip(tokens, values, strict=True))
