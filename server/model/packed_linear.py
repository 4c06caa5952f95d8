"""Linear layers whose weight is laid out for the CPU once, at load.

A decode step reads every weight once, so its speed is that of the memory. oneDNN reads a weight that was
reordered beforehand at nearly the full rate, where `F.linear` reaches half of it or less; and in float32 its
results do not depend on how many rows are in the batch, which keeps an answer the same alone and in company.
The operators are torch inductor's own and not documented, so each weight is checked against `F.linear` when
it is packed, and stays as it was if anything is unexpected. A packed weight is opaque: pack last, and load
again to change it.

oneDNN makes code for each number of rows that it meets and keeps it, 1 to 4 MB for all layers of a small
model. A server would meet every number, so many rows are filled up to one of a few.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_CHECKED_ROWS = 3  # rows of the self-test; more than one, so that a transposed result cannot pass
_TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 4e-2,
}  # of the largest value: only a wrong layout is meant to fail


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's own layout. x [..., in_features] in the weight's dtype."""

    def __init__(self, packed: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> None:
        super().__init__()
        # Not a Parameter and not a buffer: an opaque tensor can be neither copied, cast nor saved.
        self._packed = packed
        self._bias = bias
        self._linear = torch.ops.mkldnn._linear_pointwise
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self._bias)

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    @property
    def dtype(self) -> torch.dtype:
        return self._packed.dtype

    def product(self, x: Tensor) -> Tensor:
        """x W^T without the bias, x [n, in_features]."""
        return self._multiply(x, None)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        num_rows = rows.shape[0]
        if num_rows == 0:  # oneDNN refuses an empty product; a step without sampling rows has one
            return x.new_empty(*x.shape[:-1], self.out_features)
        num_more = filled_up(num_rows) - num_rows
        if num_more:
            rows = F.pad(rows, (0, 0, 0, num_more))
        y: Tensor = self._linear(rows, self._packed, bias, "none", [], "")
        return y[:num_rows].view(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """W [out_features, in_features] as it was, in memory of its own. Costs about what packing costs.

        RuntimeError if oneDNN gives something else than what this layer computes with.
        """
        weight = self._packed.to_dense()
        if not _agrees(self, weight, self._bias):
            raise RuntimeError("a packed weight cannot be read back on this machine")
        return weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"
        )


def filled_up(num_rows: int) -> int:
    """How many rows are computed for so many: at most 16 more up to 512, at most a quarter more beyond."""
    if num_rows <= 16:
        return num_rows  # decoding; each row costs there
    step = 16 if num_rows <= 512 else 128
    return -(-num_rows // step) * step


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and this CPU have packed products of the dtype."""
    if not torch._C._has_mkldnn or dtype not in _TOLERANCE:
        return False
    if not (
        hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linear(linear: nn.Module, *, is_checked: bool = False) -> PackedLinear | None:
    """A packed copy of an nn.Linear or a Conv1D; None if it cannot be made or is not the same function.

    `is_checked`: a weight of this shape has passed the comparison, which need not be made again.
    """
    weight, bias = _weight_and_bias(linear)  # [out, in]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        candidate = PackedLinear(packed, bias, weight.shape[1], weight.shape[0])
        is_same = is_checked or _agrees(candidate, weight, bias)
    except RuntimeError:
        return None
    return candidate if is_same else None


def pack_linears(model: nn.Module, progress: Callable[[float], None]) -> int:
    """Replace every linear layer of the model, freeing each weight as soon as its packed copy is made.

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
    checked: set[tuple[int, ...]] = set()  # the layout depends on the shape alone
    for done, (parent, name, child) in enumerate(sites):
        kind = (*child.get_parameter("weight").shape, child.bias is not None, type(child) is Conv1D)
        packed = pack_linear(child, is_checked=kind in checked)
        if packed is not None:
            checked.add(kind)
            setattr(parent, name, packed)
            num_packed += 1
        sites[done] = (parent, name, parent)  # the list must not keep the weight alive
        del child
        progress((done + 1) / len(sites))
    return num_packed


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """[out, in] and [out]. GPT-2's Conv1D stores [in, out]."""
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    matrix = weight.detach()
    if isinstance(linear, Conv1D):
        matrix = matrix.t().contiguous()
    return matrix, None if bias is None else bias.detach().clone()  # not a view of the mapped file


def _agrees(candidate: PackedLinear, weight: Tensor, bias: Tensor | None) -> bool:
    """Compare on rows that make every input and every output matter."""
    steps = torch.arange(_CHECKED_ROWS * weight.shape[1], dtype=torch.float32)
    x = torch.sin(steps * 0.7).view(_CHECKED_ROWS, weight.shape[1]).to(weight.dtype)
    with torch.inference_mode():
        expected, got = F.linear(x, weight, bias).float(), candidate(x).float()
    if got.shape != expected.shape:
        return False
    error = (got - expected).abs().max()
    return bool(error <= _TOLERANCE[weight.dtype] * expected.abs().max().clamp(min=1e-6))
