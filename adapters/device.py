"""The arena: the memory out of which the kernels read the adapters of a step.

`placement.py` decides who is where; an arena only carries that out. On the CPU the host copy *is* the arena:
writing an adapter keeps a reference, moving it does nothing, and offsets mean nothing. On another device the
arena is one flat tensor, allocated once; writing an adapter copies one run, and compaction moves runs inside
the tensor, so its address never changes. All methods belong to the engine thread.
"""

from typing import Protocol

import torch
from torch import Tensor

from adapters.kernels import LoraKernel, pick
from adapters.kernels.cuda import GroupKernel
from adapters.run import AdapterViews, RunLayout, make_views
from adapters.types import AdapterRef, AdapterWrite, Revision
from adapters.weights import LoraWeights

_MOVE_ELEMENTS = 8 * 1024 * 1024  # a staging buffer of 16 MiB in 16-bit types: few copies, little memory


class Arena(Protocol):
    """Resident adapters, and the kernel that computes with them."""

    device: torch.device
    kernel: LoraKernel

    def write(self, write: AdapterWrite, weights: LoraWeights | None) -> None:
        """Make the adapter resident at its offset. Without `write.moved_from` it needs the `weights`."""
        ...

    def evict(self, ref: AdapterRef) -> None:
        """Forget the adapter; unknown ones are ignored."""
        ...

    def adapter(self, revision: Revision) -> AdapterViews:
        """All that a resident adapter has; the same object as long as it stays where it is."""
        ...


class HostArena:
    """The host copies themselves."""

    def __init__(self, kernel: LoraKernel | None = None) -> None:
        self.device = torch.device("cpu")
        self.kernel: LoraKernel = GroupKernel() if kernel is None else kernel
        self._adapters: dict[Revision, AdapterViews] = {}

    def write(self, write: AdapterWrite, weights: LoraWeights | None) -> None:
        if write.moved_from is None or write.ref.revision not in self._adapters:
            assert weights is not None, "nothing to write"
            self._adapters[write.ref.revision] = make_views(weights.run, weights.layout)

    def evict(self, ref: AdapterRef) -> None:
        if self._adapters.pop(ref.revision, None) is not None:
            self.kernel.forget(ref.revision)

    def adapter(self, revision: Revision) -> AdapterViews:
        return self._adapters[revision]


class DeviceArena:
    """One flat tensor and a table of what lies where in it."""

    def __init__(
        self,
        device: torch.device,
        capacity_bytes: int,
        dtype: torch.dtype,
        kernel: LoraKernel | None = None,
    ) -> None:
        self.device = device
        self.kernel: LoraKernel = GroupKernel() if kernel is None else kernel
        self._memory = torch.empty(capacity_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._layouts: dict[Revision, RunLayout] = {}
        self._adapters: dict[Revision, AdapterViews] = {}

    def write(self, write: AdapterWrite, weights: LoraWeights | None) -> None:
        revision = write.ref.revision
        run = self._run(write.offset, write.num_bytes)
        if write.moved_from is not None and revision in self._layouts:
            _move(self._run(write.moved_from, write.num_bytes), run)
        else:
            assert weights is not None, "nothing to write"
            run[: weights.run.numel()].copy_(weights.run, non_blocking=True)
            self._layouts[revision] = weights.layout
        self._adapters[revision] = make_views(run, self._layouts[revision])

    def evict(self, ref: AdapterRef) -> None:
        if self._layouts.pop(ref.revision, None) is not None:
            del self._adapters[ref.revision]
            self.kernel.forget(ref.revision)

    def adapter(self, revision: Revision) -> AdapterViews:
        return self._adapters[revision]

    def _run(self, offset: int, num_bytes: int) -> Tensor:
        size = self._memory.element_size()
        return self._memory.narrow(0, offset // size, num_bytes // size)


def _move(source: Tensor, target: Tensor) -> None:
    """Copy within one tensor where both may overlap.

    Piece by piece through a staging buffer, from the end that the runs move towards: a piece is read before
    anything is written over it.

        to the left    source    . . [1][2][3]        pieces ascending
                       target    [1][2][3]
    """
    starts = range(0, source.numel(), _MOVE_ELEMENTS)
    is_left = target.storage_offset() <= source.storage_offset()
    for start in starts if is_left else reversed(starts):
        piece = source[start : start + _MOVE_ELEMENTS].clone()
        target[start : start + _MOVE_ELEMENTS].copy_(piece)


def make_arena(
    device: torch.device | str, capacity_bytes: int, dtype: torch.dtype, *, pack_bytes: int | None = None
) -> Arena:
    """The arena for a device, with the kernel for it.

    `pack_bytes`: what the CPU kernel may take for re-ordered copies of the adapters in use; by default
    `capacity_bytes`, since the arena itself takes nothing there.
    """
    device = torch.device(device)
    kernel = pick(device, dtype, capacity_bytes if pack_bytes is None else pack_bytes)
    if device.type == "cpu":
        return HostArena(kernel)
    return DeviceArena(device, capacity_bytes, dtype, kernel)
