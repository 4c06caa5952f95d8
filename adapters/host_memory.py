"""Where host copies of adapters lie: in ordinary memory, or page-locked for a device that copies by itself.

A copy to a GPU can run beside the engine's thread only from page-locked memory; from any other the driver
first copies it to such memory of its own, and the caller waits. torch's allocator of page-locked memory may
round sizes up to powers of two and keeps what is freed. Adapters are counted to the byte, so here each copy
has a mapping of its own, as long as it is in pages, which is registered with the driver.

Locking and unlocking pages takes milliseconds. Loaders do both: a mapping that nobody uses any more, wherever
that happened, waits for the next load, which takes it if it has the right size, as between adapters of
one shape, and else gives it back to the system.
"""

import logging
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from adapters import pages

logger = logging.getLogger(__name__)

Allocate = Callable[[int, torch.dtype], Tensor]
"""So many zeros. Any loader may call it."""

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


class Registrar(Protocol):
    """The two calls of the CUDA runtime that lock pages; both return 0 for success."""

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int, /) -> int: ...
    def cudaHostUnregister(self, address: int, /) -> int: ...


def ordinary(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Memory that the system may move to disk; it makes the zeros as they are touched."""
    return pages.zeros(num_elements, dtype)


def memory_for(device: torch.device) -> Allocate:
    """What host copies for this device should lie in."""
    if device.type != "cuda":
        return ordinary
    return PageLocked(torch.cuda.cudart(), device).allocate  # type: ignore[no-untyped-call]


class PageLocked:
    """Page-locked memory; what cannot be locked stays ordinary, and is copied with the caller waiting."""

    def __init__(self, registrar: Registrar, device: torch.device) -> None:
        """`device`: where the driver is asked; the one that is computed on, or it would wake another."""
        self._registrar = registrar
        self._device = device
        self._unused: deque[_Mapping] = deque()  # the only thing that threads share; its ends are atomic
        self._has_warned = False

    def allocate(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        num_bytes = num_elements * dtype.itemsize
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        used = self._take_unused(size)
        mapping = used or self._map(size)
        view = memoryview(mapping.memory)
        tensor = torch.frombuffer(view, dtype=dtype, count=num_elements)  # holds the view as long as it lives
        weakref.finalize(view, self._unused.append, mapping).atexit = False
        return tensor if used is None else tensor.zero_()

    def _take_unused(self, size: int) -> "_Mapping | None":
        """One of this size; the others that were seen on the way go back to the system."""
        while self._unused:
            try:
                mapping = self._unused.popleft()
            except IndexError:
                break  # another loader took it
            if len(mapping.memory) == size:
                return mapping
            if mapping.is_locked:
                self._ask(self._registrar.cudaHostUnregister, mapping.address)
            mapping.memory.close()
        return None

    def _map(self, size: int) -> "_Mapping":
        memory = mmap.mmap(-1, size)
        address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
        is_locked = self._ask(self._registrar.cudaHostRegister, address, size, _PORTABLE) == 0
        if not is_locked and not self._has_warned:
            self._has_warned = True
            logger.warning("host memory cannot be page-locked: loading adapters will hold up running streams")
        return _Mapping(memory, address, is_locked)

    def _ask(self, call: Callable[..., int], *arguments: int) -> int:
        if self._device.type != "cuda":
            return int(call(*arguments))
        with torch.cuda.device(self._device):
            return int(call(*arguments))


class _Mapping:
    """Pages of our own."""

    __slots__ = ("address", "is_locked", "memory")

    def __init__(self, memory: mmap.mmap, address: int, is_locked: bool) -> None:
        self.memory = memory
        self.address = address
        self.is_locked = is_locked
