"""Small tensors from host to device without waiting: from pinned memory, which the device reads by itself."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """`host` on `device`. Never synchronises; on CPU the tensor itself."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class Numbers:
    """One list of integers that is moved at once, and then cut."""

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def add(self, values: Sequence[int]) -> slice:
        """Where they will be."""
        start = len(self._numbers)
        self._numbers.extend(values)
        return slice(start, len(self._numbers))

    def to_device(self, device: torch.device) -> Tensor:
        """int64. The slices are views of it."""
        return to_device(torch.tensor(self._numbers, dtype=torch.int64), device)
