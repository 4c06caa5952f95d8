"""How several adapters become one by merging their weights: the recipe, its identity and its name.

The arithmetic is in merge.py. Whoever asks for a merge twice, in whatever order, gets the same adapter: what
cannot change the result is not part of a recipe's key.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

from adapters.types import Revision

_KEY_BYTES = 16
_MAX_NAME_CHARS = 256


class MergeMethod(StrEnum):
    """What happens to the weights before they are summed."""

    LINEAR = "linear"  # nothing
    TIES = "ties"  # the smallest are dropped, then those against the majority's sign; arXiv:2306.01708
    DARE_LINEAR = "dare_linear"  # random ones are dropped, the others grow in turn; arXiv:2311.03099
    DARE_TIES = "dare_ties"  # the same, then those against the majority's sign

    @property
    def drops_some(self) -> bool:
        """Whether `density` means anything."""
        return self is not MergeMethod.LINEAR

    @property
    def is_random(self) -> bool:
        return self in (MergeMethod.DARE_LINEAR, MergeMethod.DARE_TIES)

    @property
    def elects_sign(self) -> bool:
        return self in (MergeMethod.TIES, MergeMethod.DARE_TIES)


class MajoritySign(StrEnum):
    """Whose sign wins at each place."""

    TOTAL = "total"  # that of the sum
    FREQUENCY = "frequency"  # that of the larger number of adapters


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """How adapters are merged; the weights belong to them in order."""

    weights: tuple[float, ...]  # at least one
    method: MergeMethod = MergeMethod.LINEAR
    density: float = 1.0  # share of the numbers that is kept, (0, 1]
    majority_sign: MajoritySign = MajoritySign.TOTAL

    @property
    def effective_method(self) -> MergeMethod:
        """A single adapter is weighted and nothing else, as PEFT has it."""
        return self.method if len(self.weights) > 1 else MergeMethod.LINEAR

    def in_order(self, revisions: Sequence[Revision]) -> tuple[int, ...]:
        """The positions of the adapters in the one order in which they are merged."""
        return tuple(sorted(range(len(revisions)), key=lambda i: (revisions[i], self.weights[i])))

    def for_positions(self, positions: Sequence[int]) -> "MergeRecipe":
        """The same for adapters that stand in another order."""
        weights = tuple(self.weights[i] for i in positions)
        return MergeRecipe(weights, self.method, self.density, self.majority_sign)

    def key(self, revisions: Sequence[Revision]) -> str:
        """Digest of what is merged and how: the merged adapter's revision, and the seed of what is random."""
        method = self.effective_method
        digest = blake2b(f"merge {method}".encode(), digest_size=_KEY_BYTES)
        if method.drops_some:
            digest.update(struct.pack("<d", self.density))
        if method.elects_sign:
            digest.update(f" {self.majority_sign}".encode())
        for i in self.in_order(revisions):
            digest.update(struct.pack("<d", self.weights[i]) + f" {revisions[i]}".encode())
        return digest.hexdigest()

    def name_for(self, names: Sequence[str]) -> str:
        """For people, as in "ties(ant:0.5+bee:2, density 0.3)"."""
        terms = "+".join(f"{name}:{weight:g}" for name, weight in zip(names, self.weights, strict=True))
        method = self.effective_method
        more = f", density {self.density:g}" if method.drops_some else ""
        if method.elects_sign and self.majority_sign is not MajoritySign.TOTAL:
            more += f", {self.majority_sign}"
        most = _MAX_NAME_CHARS - len(f"{method}({more})")
        return f"{method}({terms if len(terms) <= most else terms[: most - 1] + '…'}{more})"
