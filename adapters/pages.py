"""Memory for what a CPU reads from end to end again and again: weights and adapters.

Each has a mapping of its own, not a place among what the process allocates for a moment: what leaves goes
back to the system whole, and thousands of adapters that come and go leave no holes. Large ones lie in huge
pages. In ordinary pages of 4 KiB a reader looks up an address for every 64 lines of the cache, in tables
that a few hundred megabytes do not fit. In pages of 2 MiB it hardly ever does: one row through 700 MB of
weights took 18.6 ms instead of 23.6, sixteen rows 36.0 instead of 39.2 (two cores of a Zen 4, in one
process by turns). Systems that leave the choice to programs (`madvise`) have to be asked. Nothing is
wasted: a mapping begins at a huge page, and what is left at its end lies in ordinary pages.
"""

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20

_SMALLEST_MAPPING = 64 << 10
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def zeros(num_elements: int, dtype: torch.dtype) -> Tensor:
    """One dimension; in huge pages where it fills one and the system has such."""
    num_bytes = num_elements * dtype.itemsize
    if num_bytes < _SMALLEST_MAPPING:
        return torch.zeros(num_elements, dtype=dtype)
    if num_bytes < HUGE_PAGE_BYTES:
        return torch.frombuffer(_map(num_bytes), dtype=dtype, count=num_elements)
    memory, start = map_huge(num_bytes)
    return torch.frombuffer(memory, dtype=dtype, count=num_elements, offset=start)


def map_huge(num_bytes: int) -> tuple[mmap.mmap, int]:
    """So many zeros, and more, in a mapping; and where in it they begin: at a huge page, if the system has
    such.
    """
    # Longer by a page, so that it can begin at one; what nobody touches takes no memory.
    memory = _map(num_bytes + HUGE_PAGE_BYTES)
    if _ADVICE is not None:
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(_ADVICE)
    address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return memory, -address % HUGE_PAGE_BYTES


def _map(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
