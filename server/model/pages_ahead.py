"""Memory for a model's weights, taken from the system while transformers is imported.

A new page costs what it takes to clear it, and on a virtual machine that gives free memory back to its host
several times as much: to pack 1 GB of weights into new memory took 1.0 to 2.3 s, into pages that were there
0.34 (two cores of a Zen 4). Imports are Python, which keeps one core busy; another takes the pages meanwhile.
It stops when the first of them are asked for: from then on all cores pack, and each takes what it writes to.
All lies in one mapping, for what a server loads at its start stays as long as it does. Nothing is taken that
the weights would not need, and what is left over goes back once the model is loaded.
"""

import math
import mmap
import sys
import threading
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters import pages
from server.model.cpu_kernels import BITS, KernelChoice, Quantization, computes_bfloat16
from server.model.memory import available_cpu_bytes

_CHUNK_BYTES = 32 << 20  # 25 ms: for so long, at most, the first who asks waits
_WORTHWHILE_BYTES = 64 << 20
_SHARE = 2  # of what the machine has left, no more than a half


class PagesAhead:
    """A context manager. Inside, a thread takes pages until the first `zeros`."""

    def __init__(self, num_bytes: int) -> None:
        """Of so many bytes; 0: of none."""
        self._left = num_bytes
        self._memory, self._next = pages.map_huge(num_bytes)
        self._is_wanted = threading.Event()
        self._taker = threading.Thread(target=self._take, name="motet-pages", daemon=True)

    def __enter__(self) -> Self:
        self._taker.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give back what nobody asked for."""
        self._stop_taking()
        if self._left:
            self._left = 0
            self._memory.madvise(mmap.MADV_DONTNEED, _up_to_page(self._next))

    def zeros(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """One dimension; when these pages are used up, or too few, and after the end, as
        `adapters.pages.zeros`. For one thread until the end, for any after it.
        """
        self._stop_taking()
        num_bytes = num_elements * dtype.itemsize
        needed = _up_to_page(num_bytes)
        if not num_bytes or needed > self._left:
            return pages.zeros(num_elements, dtype)
        made = torch.frombuffer(self._memory, dtype=dtype, count=num_elements, offset=self._next)
        self._left -= needed
        self._next += needed
        return made

    def _stop_taking(self) -> None:
        """From here on nobody but the caller touches the memory."""
        self._is_wanted.set()
        self._taker.join()

    def _take(self) -> None:
        start, stop = self._next, self._next + self._left
        for chunk in range(start, stop, _CHUNK_BYTES):
            if self._is_wanted.is_set():
                return
            num_bytes = min(_CHUNK_BYTES, stop - chunk)
            memory = torch.frombuffer(self._memory, dtype=torch.uint8, count=num_bytes, offset=chunk)
            memory[:: mmap.PAGESIZE].zero_()  # a byte of each page, without the interpreter lock


def pages_for(
    folder: Path | None, device: str, cpu_kernels: KernelChoice, quantization: Quantization
) -> PagesAhead:
    """For the checkpoint in a folder, as the operator wants it served; None: for a small one. None are taken
    where other kernels than ours allocate their weights by themselves.
    """
    is_ours = sys.platform == "linux" and not (device != "cpu" and torch.cuda.is_available())
    if folder is None or not is_ours or not computes_bfloat16(cpu_kernels):
        return PagesAhead(0)
    num_bytes = min(_num_weights(folder) * BITS[quantization] // 8, available_cpu_bytes() // _SHARE)
    return PagesAhead(num_bytes if num_bytes >= _WORTHWHILE_BYTES else 0)


def _num_weights(folder: Path) -> int:
    """By its files; 0 if they cannot be read, which the loader will explain."""
    total = 0
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as stored:
                names = stored.keys()
                total += sum(math.prod(stored.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError):
        return 0
    return total


def _up_to_page(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
