"""The arena: the memory out of which the kernels read the adapters of a step.

`placement.py` decides who is where; an arena only carries that out. On the CPU the host copy *is* the arena:
writing an adapter keeps a reference, moving it does nothing, and offsets mean nothing. On another device the
arena is one flat tensor, allocated once; writing an adapter copies one run, and compaction moves runs inside
the tensor, so its address never changes. All methods belong to the engine thread.

Adapters reach a GPU on a *lane* beside the stream that computes:

    compute   ... step 7 ...|F|......... step 8 .........|W|... step 9, the first that uses a ...
    lane                      └─ copy of a, prefetched ─┘

    F  the copy begins when all that was ordered before it is done: its bytes may have been another adapter's,
       which step 7 still reads, or which were moved from there
    W  whatever touches a, or gives its bytes to somebody else, comes after the copy
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adapters.kernels import LoraKernel, pick
from adapters.kernels.groups import GroupKernel
from adapters.kernels.native.compiled import INSTRUCTION_SETS, InstructionSet
from adapters.run import AdapterViews, RunLayout, make_views
from adapters.types import AdapterRef, AdapterWrite, Revision
from adapters.weights import LoraWeights

_MOVE_ELEMENTS = 8 * 1024 * 1024  # a staging buffer of 16 MiB in 16-bit types: few copies, little memory


class Arena(Protocol):
    """Resident adapters, and the kernel that computes with them."""

    device: torch.device
    kernel: LoraKernel

    def write(self, write: AdapterWrite, weights: LoraWeights | None) -> None:
        """Make the adapter resident at its offset. Without `write.moved_from` it needs the `weights`.

        An adapter that was prefetched to this offset is only waited for, by the device and not by us.
        """
        ...

    def prefetch(self, write: AdapterWrite, weights: LoraWeights) -> None:
        """Begin to make it resident, beside the steps that do not use it. In order with writes and evictions.

        A `write` may follow, and need not: whoever uses the adapter comes after the copy.
        """
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

    def prefetch(self, write: AdapterWrite, weights: LoraWeights) -> None:
        self.write(write, weights)  # a reference costs nothing

    def evict(self, ref: AdapterRef) -> None:
        if self._adapters.pop(ref.revision, None) is not None:
            self.kernel.forget(ref.revision)

    def adapter(self, revision: Revision) -> AdapterViews:
        return self._adapters[revision]


class Lane(Protocol):
    """Where copies run beside what is computed."""

    def begin(self, target: Tensor, source: Tensor) -> object:
        """Copy after all that was ordered so far; returns a ticket. `source` may be dropped at once."""
        ...

    def wait(self, ticket: object) -> None:
        """What is ordered from now on comes after the copy. Does not wait itself."""
        ...


class SideStream:
    """A CUDA stream beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sources: deque[tuple[torch.cuda.Event, Tensor]] = deque()  # must not be freed while being read

    def begin(self, target: Tensor, source: Tensor) -> object:
        while self._sources and self._sources[0][0].query():  # type: ignore[no-untyped-call]
            self._sources.popleft()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        done = self._stream.record_event()
        self._sources.append((done, source))
        return done

    def wait(self, ticket: object) -> None:
        assert isinstance(ticket, torch.cuda.Event), "a ticket of another lane"
        torch.cuda.current_stream(self._device).wait_event(ticket)


class _NoLane:
    """For devices that do one thing after the other."""

    def begin(self, target: Tensor, source: Tensor) -> object:
        return target.copy_(source)

    def wait(self, ticket: object) -> None:
        """Done already."""


@dataclass(frozen=True, slots=True)
class _Copying:
    """A run that is on its way."""

    offset: int
    ticket: object


class DeviceArena:
    """One flat tensor and a table of what lies where in it."""

    def __init__(
        self,
        device: torch.device,
        capacity_bytes: int,
        dtype: torch.dtype,
        kernel: LoraKernel | None = None,
        lane: Lane | None = None,
    ) -> None:
        """`lane`: a side stream by default, where the device has such."""
        self.device = device
        self.kernel: LoraKernel = GroupKernel() if kernel is None else kernel
        self._memory = torch.empty(capacity_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._layouts: dict[Revision, RunLayout] = {}
        self._adapters: dict[Revision, AdapterViews] = {}
        self._copying: dict[Revision, _Copying] = {}  # until it is first touched
        self._lane: Lane = lane or (SideStream(device) if device.type == "cuda" else _NoLane())

    def write(self, write: AdapterWrite, weights: LoraWeights | None) -> None:
        revision = write.ref.revision
        if write.moved_from is not None and revision in self._layouts:
            self._await(revision)
            run = self._run(write.offset, write.num_bytes)
            _move(self._run(write.moved_from, write.num_bytes), run)
            self._adapters[revision] = make_views(run, self._layouts[revision])
            return
        copying = self._copying.get(revision)
        if copying is None or copying.offset != write.offset:
            assert weights is not None, "nothing to write"
            self.prefetch(write, weights)
        self._await(revision)

    def prefetch(self, write: AdapterWrite, weights: LoraWeights) -> None:
        revision = write.ref.revision
        self._await(revision)  # where it was going to before, others may be going now
        run = self._run(write.offset, write.num_bytes)
        ticket = self._lane.begin(run[: weights.run.numel()], weights.run)
        self._copying[revision] = _Copying(write.offset, ticket)
        self._layouts[revision] = weights.layout
        self._adapters[revision] = make_views(run, weights.layout)

    def evict(self, ref: AdapterRef) -> None:
        if self._layouts.pop(ref.revision, None) is not None:
            self._await(ref.revision)
            del self._adapters[ref.revision]
            self.kernel.forget(ref.revision)

    def adapter(self, revision: Revision) -> AdapterViews:
        self._await(revision)
        return self._adapters[revision]

    def _await(self, revision: Revision) -> None:
        """Whatever is ordered from now on finds the run complete, or its bytes left alone."""
        copying = self._copying.pop(revision, None)
        if copying is not None:
            self._lane.wait(copying.ticket)

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
    device: torch.device | str,
    capacity_bytes: int,
    dtype: torch.dtype,
    *,
    native: Sequence[InstructionSet] = INSTRUCTION_SETS,
) -> Arena:
    """The arena for a device, with the kernel for it; our own only for the instruction sets in `native`."""
    device = torch.device(device)
    kernel = pick(device, dtype, native=native)
    if device.type == "cpu":
        return HostArena(kernel)
    return DeviceArena(device, capacity_bytes, dtype, kernel)
