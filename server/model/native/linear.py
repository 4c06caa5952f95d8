"""Linear layers over weights that our own kernels read (`linear.h`)."""

from torch import Tensor

from server.model.native.bindings import NativeKernels
from server.model.packed_linear import PackedLinear


class NativeLinear(PackedLinear):
    """Reads a weight at the full rate of the memory, and gives a row the same bits in any company."""

    def __init__(self, kernels: NativeKernels, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` [out, in] in the kernels' dtype, `in` a multiple of their tuples."""
        super().__init__(weight, bias)
        self._kernels = kernels
        self.packed = kernels.pack(weight)

    def dense(self) -> Tensor:
        return self._kernels.unpack(self.packed, self.out_features, self.in_features)

    def _multiply(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return self._kernels.linear(rows, self.packed, bias, self.out_features)


class NativeLayout:
    """Makes such layers where it can."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def pack(self, weight: Tensor, bias: Tensor | None) -> NativeLinear | None:
        if weight.dtype is not self._kernels.dtype or weight.shape[1] % self._kernels.tuple_size:
            return None
        return NativeLinear(self._kernels, weight, bias)
