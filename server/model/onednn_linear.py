"""Linear layers over weights in oneDNN's own layout.

Its products reach nearly the full rate of the memory, and in float32 their results do not depend on how many
rows are in the batch, which keeps an answer the same alone and in company. The operators are torch inductor's
own and not documented: see `packed_linear` for what guards them.

oneDNN makes code for each number of rows that it meets and keeps it, 1 to 4 MB for all layers of a small
model. A server would meet every number, so many rows are filled up to one of a few.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.kernels.native.compiled import is_x86
from server.model.packed_linear import PackedLinear, agrees


class OneDnnLinear(PackedLinear):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._linear = torch.ops.mkldnn._linear_pointwise

    def dense(self) -> Tensor:
        weight = self._packed.to_dense()
        if not agrees(self, weight, self._bias):
            raise RuntimeError("a packed weight cannot be read back on this machine")
        return weight

    def _multiply(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        num_rows = rows.shape[0]
        num_more = filled_up(num_rows) - num_rows
        if num_more:
            rows = F.pad(rows, (0, 0, 0, num_more))
        y: Tensor = self._linear(rows, self._packed, bias, "none", [], "")
        return y[:num_rows]


class OneDnnLayout:
    """What this build of torch and this CPU have packed products for."""

    tolerance = None

    def pack(self, weight: Tensor, bias: Tensor | None) -> OneDnnLinear | None:
        return OneDnnLinear(weight, bias) if self.takes(weight.dtype) else None

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        if not torch._C._has_mkldnn or dtype not in (torch.float32, torch.bfloat16):
            return False
        operators = ("_reorder_linear_weight", "_linear_pointwise")
        if not all(hasattr(torch.ops.mkldnn, operator) for operator in operators):
            return False
        if dtype is torch.float32:
            return True
        # On arm64 oneDNN's packed products in bfloat16 are its reference loops, which torch's own are not.
        return is_x86() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def filled_up(num_rows: int) -> int:
    """How many rows are computed for so many: at most 15 more up to 512, at most a quarter more beyond."""
    if num_rows <= 16:
        return num_rows  # decoding; each row costs there
    step = 16 if num_rows <= 512 else 128
    return -(-num_rows // step) * step
