"""What the loader of an adapter may ask about the served model's own weights.

DoRA gives the length that each row of W + B A shall have, so its factors depend on W. And PEFT saves the
whole weight of an embedding beside what it has trained of it, which may only be left aside if it is the one
that is served.
"""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from adapters.types import TargetId


class BaseWeights(Protocol):
    """The weights W [out, in] and biases of all targets; an embedding's W is its table transposed.

    Called by loader threads while the engine computes with the same weights. All results lie on the CPU.
    """

    def squared_norms(self, target: TargetId) -> Tensor:
        """Squared length of each row of W. float32 [out]; must not be changed."""
        ...

    def project(self, target: TargetId, a: Tensor) -> Tensor:
        """W A^T for A float32 [r, in]. float32 [out, r]"""
        ...

    def bias(self, target: TargetId) -> Tensor | None:
        """float32 [out]"""
        ...

    def token_rows(self, target: TargetId, num_rows: int) -> Iterator[Tensor]:
        """The rows of an embedding or a head in the order of the tokens, at most `num_rows` at a time, in the
        served dtype.
        """
        ...
