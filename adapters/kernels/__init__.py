"""One signature for all backends.

    y[t] += sum over the groups of t: scale * (gain * y[t] + (x[t] @ A.T) @ B.T + bias)

A, B, gain and bias are what the group's adapter has for the target. y [T, O], x [T, I], A [r, I], B [O, r],
gain [O] and bias [O], one dtype; r is each adapter's own rank for this target, and the scale that it was
trained with is already in B. On the right y is the base's answer: a token of several adapters must not use
one that has a gain, because kernels add in any order. Tokens without an adapter, or whose adapter lacks the
target, keep their y. Any order of tokens; adapters may repeat. `reference.py` is the meaning, `groups.py` is
plain torch on every device, `native` our own on the CPU.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from adapters.kernels.groups import GroupKernel
from adapters.kernels.native.bindings import NativeLora
from adapters.kernels.native.compiled import INSTRUCTION_SETS, InstructionSet, KernelsMissing
from adapters.kernels.native.kernel import NativeKernel
from adapters.types import Revision, TargetId

if TYPE_CHECKING:
    from adapters.batch import LoraBatch


class LoraKernel(Protocol):
    """A backend. What it derives from adapters it keeps by revision. It belongs to the engine thread."""

    def add_lora(self, y: Tensor, x: Tensor, target: TargetId, batch: "LoraBatch") -> Tensor:
        """The sum; `y` may be changed in place, and is where nothing else is returned. T = 0 is allowed."""
        ...

    def forget(self, revision: Revision) -> None:
        """The adapter has left the arena: give back what was derived from it."""
        ...


def pick(
    device: torch.device, dtype: torch.dtype, *, native: Sequence[InstructionSet] = INSTRUCTION_SETS
) -> LoraKernel:
    """The fastest kernel for the device; our own compiled one only for the instruction sets in `native`."""
    if device.type == "cpu" and native:
        try:
            return NativeKernel(NativeLora(dtype, native))
        except KernelsMissing:
            pass  # whoever loads the model says so (`server.model.cpu_kernels`)
    return GroupKernel()
