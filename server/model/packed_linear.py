"""Linear layers whose weight is laid out for the CPU once, at load.

A decode step reads every weight once, so its speed is that of the memory, and the order in which a weight
lies decides how much of it is reached: `F.linear` gets half of it or less. Several layouts are known
(`cpu_kernels.py`). Each weight is compared with `F.linear` when it is packed, goes to the next layout if
anything is unexpected, and in the end stays as it was. A packed weight is opaque: pack last, and load again
to change it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_CHECKED_ROWS = 3  # rows of the self-test; more than one, so that a transposed result cannot pass
_TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 4e-2,
}  # of the largest value: only a wrong layout is meant to fail


class PackedLinear(nn.Module, ABC):
    """y = x W^T + b with W in a layout of its own. x [..., in_features] in the weight's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` [out, in] is not kept."""
        super().__init__()
        # Neither a Parameter nor a buffer, like the packed weight: what is opaque cannot be cast or saved.
        self._bias = bias
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_to(x, self._bias)

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    @property
    def num_bytes(self) -> int:
        """Of the weight, as it lies."""
        return self.out_features * self.in_features * self.dtype.itemsize

    def product(self, x: Tensor) -> Tensor:
        """x W^T without the bias, x [n, in_features]."""
        return self._apply_to(x, None)

    @abstractmethod
    def dense(self) -> Tensor:
        """W [out_features, in_features] as it was, in memory of its own. Costs about what packing costs.

        RuntimeError if that cannot be told.
        """

    @abstractmethod
    def _multiply(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """rows [n, in_features] -> [n, out_features]; n > 0."""

    def _apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        if x.numel() == 0:  # a step without sampling rows has an empty product
            return x.new_empty(shape)
        return self._multiply(x.reshape(-1, self.in_features), bias).view(shape)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"
        )


class Layout(Protocol):
    """A way to lay out weights."""

    @property
    def tolerance(self) -> float | None:
        """How far its layers may be off, by the largest value; None: what rounding to the dtype explains."""
        ...

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear | None:
        """A layer with a copy of `weight` [out, in]; None if this layout has nothing for it.

        May raise RuntimeError, which means the same.
        """
        ...


def pack_linear(
    linear: nn.Module, layouts: Sequence[Layout], *, is_checked: bool = False
) -> PackedLinear | None:
    """A packed copy of an nn.Linear or a Conv1D, in the first layout that makes the same function of it; or
    None.

    `is_checked`: a weight of this shape has passed the comparison, which need not be made again.
    """
    weight, bias = _weight_and_bias(linear)  # [out, in]
    for layout in layouts:
        try:
            packed = layout.pack(weight, bias)
            if packed is not None and (is_checked or agrees(packed, weight, bias, layout.tolerance)):
                return packed
        except RuntimeError:
            continue
    return None


def pack_linears(
    model: nn.Module,
    layouts: Sequence[Layout],
    progress: Callable[[float], None],
    *,
    head: nn.Module | None = None,
    head_layouts: Sequence[Layout] = (),
) -> int:
    """Replace every linear layer of the model, freeing each weight as soon as its packed copy is made; `head`
    is one of them, for which there are other layouts.

    A weight that is also used elsewhere (a tied embedding) stays where it is used. Returns how many were
    packed.
    """
    sites = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in (nn.Linear, Conv1D)
    ]
    num_packed = 0
    checked: set[tuple[int, ...]] = set()  # a layout depends on the shape alone
    for done, (parent, name, child) in enumerate(sites):
        kind = (*child.get_parameter("weight").shape, child.bias is not None, type(child) is Conv1D)
        packed = pack_linear(child, head_layouts if child is head else layouts, is_checked=kind in checked)
        if packed is not None:
            checked.add(kind)
            setattr(parent, name, packed)
            num_packed += 1
        sites[done] = (parent, name, parent)  # the list must not keep the weight alive
        if child is head:
            head = None
        del child
        progress((done + 1) / len(sites))
    return num_packed


def agrees(
    candidate: PackedLinear, weight: Tensor, bias: Tensor | None, tolerance: float | None = None
) -> bool:
    """Whether it computes what `F.linear` does, on rows that make every input and every output matter."""
    steps = torch.arange(_CHECKED_ROWS * weight.shape[1], dtype=torch.float32)
    x = torch.sin(steps * 0.7).view(_CHECKED_ROWS, weight.shape[1]).to(weight.dtype)
    with torch.inference_mode():
        expected, got = F.linear(x, weight, bias).float(), candidate(x).float()
    if got.shape != expected.shape:
        return False
    error = (got - expected).abs().max()
    return bool(error <= (tolerance or _TOLERANCE[weight.dtype]) * expected.abs().max().clamp(min=1e-6))


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """[out, in] and [out]. GPT-2's Conv1D stores [in, out]."""
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    matrix = weight.detach()
    if isinstance(linear, Conv1D):
        matrix = matrix.t().contiguous()
    return matrix, None if bias is None else bias.detach().clone()  # not a view of the mapped file
