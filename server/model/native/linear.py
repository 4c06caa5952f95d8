"""Linear layers over weights that our own kernels read (`linear.h`)."""

import torch
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
        return self.rows(torch.arange(self.out_features))

    def rows(self, rows: Tensor) -> Tensor:
        """Of W: [n] in [0, out_features) -> [n, in_features]."""
        return self._kernels.rows(self.packed, self.in_features, rows)

    def _multiply(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return self._kernels.linear(rows, self.packed, bias, self.out_features)


class QuantizedLinear(PackedLinear):
    """The same over weights of few bits (`quantized.h`); rows are quantised as they come."""

    def __init__(self, kernels: NativeKernels, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        """`weight` [out, in] in the kernels' dtype; 8 or 4 bits."""
        super().__init__(weight, bias)
        self._kernels = kernels
        self.packed = kernels.quantize(weight, bits)

    @property
    def num_bytes(self) -> int:
        return self.packed.numbers.nbytes + self.packed.scales.nbytes

    def dense(self) -> Tensor:
        """What is computed with, not what it was made of."""
        return self._kernels.dequantize(self.packed, self.out_features, self.in_features)

    def _multiply(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return self._kernels.linear_quantized(rows, self.packed, bias, self.out_features)


class QuantizedLayout:
    """Makes such layers of all weights."""

    def __init__(self, kernels: NativeKernels, bits: int) -> None:
        self._kernels = kernels
        self._bits = bits
        self.tolerance = (
            0.05 if bits == 8 else 0.3
        )  # so many bits are no more than this; nonsense is farther off

    def pack(self, weight: Tensor, bias: Tensor | None) -> QuantizedLinear | None:
        if weight.dtype is not self._kernels.dtype:
            return None
        return QuantizedLinear(self._kernels, weight, bias, self._bits)


class NativeLayout:
    """Makes such layers where it can."""

    tolerance = None

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def pack(self, weight: Tensor, bias: Tensor | None) -> NativeLinear | None:
        if weight.dtype is not self._kernels.dtype or weight.shape[1] % self._kernels.tuple_size:
            return None
        return NativeLinear(self._kernels, weight, bias)
