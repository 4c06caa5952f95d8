"""Which adapter each request asks for.

The mixes are the ones of the multi-LoRA literature (Punica, arXiv:2310.18547): `one`, where a batch is as
good as the base model; `distinct`, where neighbours never agree and a batch is as bad as it gets; `uniform`;
and `zipf`, where a few adapters take most of the traffic, as they do in life.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from enum import StrEnum


class Mix(StrEnum):
    ONE = "one"  # everybody asks for the first
    UNIFORM = "uniform"  # each request draws, all alike
    DISTINCT = "distinct"  # turn by turn: n requests in a row ask for n adapters
    ZIPF = "zipf"  # each request draws, the k-th with weight k ** -alpha


def choices(mix: Mix, names: Sequence[str], seed: str, zipf_alpha: float = 1.0) -> Iterator[str]:
    """An endless stream of names, the same for the same seed."""
    if not names:
        raise ValueError("a mix needs at least one name")
    if mix is Mix.ONE:
        return itertools.repeat(names[0])
    if mix is Mix.DISTINCT:
        return itertools.cycle(names)
    if mix is Mix.UNIFORM:
        return _drawn(names, [1.0] * len(names), seed)
    return _drawn(names, [(place + 1) ** -zipf_alpha for place in range(len(names))], seed)


def _drawn(names: Sequence[str], weights: Sequence[float], seed: str) -> Iterator[str]:
    draw = random.Random(seed)
    cumulated = list(itertools.accumulate(weights))
    while True:
        yield draw.choices(names, cum_weights=cumulated)[0]
