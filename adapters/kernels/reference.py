"""What the sum means: token by token, in float32, rounded once. Slow, and right."""

from typing import TYPE_CHECKING

from torch import Tensor

from adapters.types import Revision, TargetId

if TYPE_CHECKING:
    from adapters.batch import LoraBatch


class ReferenceKernel:
    """The oracle of the tests."""

    def add_lora(self, y: Tensor, x: Tensor, target: TargetId, batch: "LoraBatch") -> Tensor:
        for group in batch.groups:
            pair = batch.arena.view(group.revision, target)
            if pair is None:
                continue
            a, b = (half.float() for half in pair)
            for start, stop in group.spans:
                for token in range(start, stop):
                    y[token] = (y[token].float() + group.scale * (b @ (a @ x[token].float()))).to(y.dtype)
        return y

    def forget(self, revision: Revision) -> None:
        """Nothing is kept."""
