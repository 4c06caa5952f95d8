"""When requests leave in an open loop: offsets from the start, decided before anything is sent.

The schedule knows nothing of the server. A slow server therefore gets its requests all the same, and what
they wait is counted, instead of being left out because a busy client came late (coordinated omission).
"""

import random
from collections.abc import Iterator
from enum import StrEnum


class Arrival(StrEnum):
    POISSON = "poisson"  # independent users: exponential gaps
    CONSTANT = "constant"  # a metronome


def offsets(arrival: Arrival, rate: float, seed: str) -> Iterator[float]:
    """Endless, increasing seconds from the start; `rate` requests per second in the long run."""
    if rate <= 0:
        raise ValueError("the rate must be above 0")
    if arrival is Arrival.CONSTANT:
        number = 0
        while True:
            yield number / rate  # not a running sum: no drift
            number += 1
    draw = random.Random(seed)
    at = 0.0
    while True:
        yield at
        at += draw.expovariate(rate)
