"""The compiled kernels of the model, if they are there and this CPU can run them (`adapters.kernels.native`).

A machine with AMX computes bfloat16 with torch: oneDNN uses its matrix units, and these kernels do not.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adapters import pages
from adapters.host_memory import Allocate
from adapters.kernels.native.bindings import NativeStep
from adapters.kernels.native.compiled import (
    INSTRUCTION_SETS,
    TUPLE_SIZES,
    InstructionSet,
    KernelsMissing,
    Library,
    cpu_has,
    load_library,
    name_of,
)
from server.model.native.structures import (
    Attention,
    Cache,
    Heads,
    Layer,
    Product,
    QuantizedProduct,
    SequenceRow,
    Step,
)

_ADDRESS, _SIZE, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class QuantizedWeight(NamedTuple):
    """A weight [out, in] of few bits, in the order that the kernels read."""

    numbers: Tensor  # uint8
    scales: Tensor  # uint8 too: what they are depends on the bits
    bits: int


class Angles(NamedTuple):
    """How far each token of a step is turned."""

    cosine: Tensor  # [P, D]
    sine: Tensor  # [P, D]
    positions: Tensor  # [T] int64, the rows of the tokens


class RMSNorm(NamedTuple):
    """weight x / sqrt(mean of the squares + epsilon), rounded before the weight (arXiv:1910.07467)."""

    weight: Tensor  # [H]
    epsilon: float


class NativeKernels:
    """The library's functions for one dtype, which all tensors have that hold no integers. All are on the
    CPU.
    """

    def __init__(self, loaded: Library, dtype: torch.dtype, allocate: Allocate = pages.zeros) -> None:
        """`allocate` makes the memory of weights."""
        self._allocate = allocate
        library, self.instructions, self.why = loaded
        name = name_of(dtype)
        self.dtype = dtype
        self._packed_size = library.motet_packed_size
        self._packed_size.restype = _SIZE
        self._packed_size.argtypes = [_SIZE, _SIZE]
        self._pack = getattr(library, f"motet_pack_{name}")
        self._pack.argtypes = [_ADDRESS, _SIZE, _SIZE, _ADDRESS, _COUNT]
        self._rows = getattr(library, f"motet_rows_{name}")
        self._rows.argtypes = [_ADDRESS, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _COUNT]
        self._quantized_size, self._scales_size = library.motet_quantized_size, library.motet_scales_size
        self._quantized_size.restype = self._scales_size.restype = _SIZE
        self._quantized_size.argtypes = self._scales_size.argtypes = [_SIZE, _SIZE, _SIZE]
        self._quantize = getattr(library, f"motet_quantize_{name}")
        self._quantize.argtypes = [_ADDRESS, _SIZE, _SIZE, _SIZE, _ADDRESS, _ADDRESS, _COUNT]
        self._dequantize = getattr(library, f"motet_dequantize_{name}")
        self._dequantize.argtypes = [_ADDRESS, _ADDRESS, _SIZE, _SIZE, _SIZE, _ADDRESS, _COUNT]
        self._linear_quantized = getattr(library, f"motet_linear_quantized_{name}")
        self._linear_quantized.argtypes = [_ADDRESS, _ADDRESS, _SIZE, _SIZE, _COUNT]
        self._linear = getattr(library, f"motet_linear_{name}")
        self._linear.argtypes = [_ADDRESS, _SIZE, _COUNT]
        self._attend = getattr(library, f"motet_attend_{name}")
        self._decode = getattr(library, f"motet_decode_{name}")
        self._decode.argtypes = [_ADDRESS, _SIZE, _ADDRESS, _COUNT]
        self._largest = getattr(library, f"motet_largest_{name}")
        self._largest.argtypes = [_ADDRESS, _SIZE, _SIZE, _ADDRESS, _ADDRESS, _COUNT]
        self._attend.argtypes = [_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _COUNT]

    @property
    def tuple_size(self) -> int:
        """Inputs that are multiplied at once for each sum. Inputs and dimensions are multiples of it."""
        return TUPLE_SIZES[self.dtype]

    def pack(self, weight: Tensor) -> Tensor:
        """[out, in] -> in the order that `linear` reads."""
        assert weight.dtype is self.dtype
        assert weight.shape[1] % self.tuple_size == 0
        weight = weight.contiguous()
        packed = self._allocate(self._packed_size(*weight.shape), self.dtype)
        self._pack(weight.data_ptr(), *weight.shape, packed.data_ptr(), torch.get_num_threads())
        return packed

    def rows(self, packed: Tensor, num_in: int, rows: Tensor) -> Tensor:
        """The rows [n] of the weight, as they were: [n, in]. Each must be one of its outputs."""
        rows = rows.contiguous()
        assert rows.dtype is torch.int64
        found = torch.empty(rows.shape[0], num_in, dtype=self.dtype)
        self._rows(
            packed.data_ptr(),
            num_in,
            rows.data_ptr(),
            *found.shape[:1],
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, num_out: int) -> Tensor:
        """x [n, in] -> x W^T + bias [n, out]. Each row is computed alike, however many there are."""
        assert x.dtype is self.dtype
        x = _with_adjacent_rows(x)
        num_rows, num_in = x.shape
        y = torch.empty(num_rows, num_out, dtype=self.dtype)
        product = Product(
            x.data_ptr(),
            x.stride(0),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            num_out,
            num_in,
            num_out,
        )
        self._linear(ctypes.byref(product), num_rows, torch.get_num_threads())
        return y

    def quantize(self, weight: Tensor, bits: int) -> QuantizedWeight:
        """[out, in] -> the nearest numbers of 8 bits, with a scale for each output, or of 4, with a scale for
        each 32 inputs of an output.
        """
        assert weight.dtype is self.dtype
        weight = weight.contiguous()
        size = *weight.shape, bits
        numbers = self._allocate(self._quantized_size(*size), torch.uint8)
        scales = self._allocate(self._scales_size(*size), torch.uint8)
        addresses = numbers.data_ptr(), scales.data_ptr()
        self._quantize(weight.data_ptr(), *size, *addresses, torch.get_num_threads())
        return QuantizedWeight(numbers, scales, bits)

    def dequantize(self, weight: QuantizedWeight, num_out: int, num_in: int) -> Tensor:
        """[out, in], what the bits stand for."""
        found = torch.empty(num_out, num_in, dtype=self.dtype)
        numbers, scales = weight.numbers.data_ptr(), weight.scales.data_ptr()
        self._dequantize(
            numbers, scales, num_out, num_in, weight.bits, found.data_ptr(), torch.get_num_threads()
        )
        return found

    def linear_quantized(
        self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, num_out: int
    ) -> Tensor:
        """As `linear`; x is quantised on the way, in groups of 128 inputs of a row."""
        assert x.dtype is self.dtype
        x = _with_adjacent_rows(x)
        num_rows, num_in = x.shape
        y = torch.empty(num_rows, num_out, dtype=self.dtype)
        product = QuantizedProduct(
            w=weight.numbers.data_ptr(),
            scales=weight.scales.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            y_stride=num_out,
            num_in=num_in,
            num_out=num_out,
            bits=weight.bits,
        )
        self._linear_quantized(
            ctypes.byref(product), x.data_ptr(), x.stride(0), num_rows, torch.get_num_threads()
        )
        return y

    def largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of each row [n, V] and the first place where it is, [n] each. NaN is larger than all
        else.
        """
        assert x.dtype is self.dtype
        x = x.contiguous()
        peaks, places = x.new_empty(len(x)), torch.empty(len(x), dtype=torch.int64)
        self._largest(x.data_ptr(), *x.shape, peaks.data_ptr(), places.data_ptr(), torch.get_num_threads())
        return peaks, places

    def decode(
        self,
        layers: "ctypes.Array[Layer]",
        hidden: Tensor,
        angles: Angles,
        places: Tensor,
        sequences: Tensor,
        blocks: Tensor,
        *,
        block_size: int,
        cache_bits: int,
        adapters: NativeStep | None,
        wanted: Tensor | None,
        wanted_adapters: NativeStep | None,
        last_norm: RMSNorm | None,
        seconds: Tensor,
    ) -> None:
        """All layers, one after the other: hidden [T, H] in place.

        `places`, `sequences` and `blocks` as for `attend`. `cache_bits`: see
        `bits_of_cache`. `wanted` [n]: of the last layer, which keeps the keys and values of all, only these
        tokens come out, ascending, and `wanted_adapters` are theirs; None: all do. `last_norm` comes after
        the last layer. `seconds` [4] in float64: what the linear layers, adapters, attention, and the rest
        took is added to it.
        """
        assert seconds.dtype is torch.float64
        assert hidden.dtype is angles.cosine.dtype is self.dtype
        assert all(part.is_contiguous() for part in (hidden, *angles))
        assert wanted is None or (wanted.dtype is torch.int64 and wanted.is_contiguous())
        step = Step(
            hidden.data_ptr(),
            *hidden.shape,
            angles.cosine.data_ptr(),
            angles.sine.data_ptr(),
            angles.positions.data_ptr(),
            places.data_ptr(),
            sequences.data_ptr(),
            len(sequences) // len(SequenceRow._fields),
            blocks.data_ptr(),
            block_size,
            cache_bits,
            None if adapters is None else adapters.address,
            None if wanted is None else wanted.data_ptr(),
            len(hidden) if wanted is None else len(wanted),
            None if wanted_adapters is None else wanted_adapters.address,
            None if last_norm is None else last_norm.weight.data_ptr(),
            0.0 if last_norm is None else last_norm.epsilon,
            seconds.data_ptr(),
        )
        self._decode(layers, len(layers), ctypes.byref(step), torch.get_num_threads())

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
        sequences: Tensor,
        blocks: Tensor,
        *,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Keep the step's keys and values, then attend: query [Hq, T, Dk], key [Hk, T, Dk], value [Hk, T, Dv]
        -> [T, Hq, Dv].

        `keys` and `values` are the cache of a layer (`native.attention`). `places` [T], `sequences` [n * 4]
        of SequenceRow and `blocks` are int64. A query sees the last `window` keys up to its own; None: all.
        """
        num_heads, num_tokens, key_dim = query.shape
        query, key, value = map(_with_adjacent_rows, (query, key, value))
        out = torch.empty(num_tokens, num_heads, value.shape[2], dtype=self.dtype)
        cache = Cache.of(keys, values, key_dim, value.shape[2])
        attention = Attention(
            Heads.of(query), out.data_ptr(), cache, blocks.data_ptr(), num_heads, window or 0, scale
        )
        self._attend(
            ctypes.byref(attention),
            ctypes.byref(Heads.of(key)),
            ctypes.byref(Heads.of(value)),
            places.data_ptr(),
            num_tokens,
            sequences.data_ptr(),
            len(sequences) // len(SequenceRow._fields),
            torch.get_num_threads(),
        )
        return out


def _with_adjacent_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def load_kernels(
    dtype: torch.dtype,
    among: Sequence[InstructionSet] = INSTRUCTION_SETS,
    *,
    beside_amx: bool = False,
    allocate: Allocate = pages.zeros,
) -> NativeKernels:
    """For the first of some instruction sets that there is. `beside_amx`: also where torch is faster, for
    what only these can do. `allocate` makes the memory of weights. Raises KernelsMissing.
    """
    if cpu_has("amx_tile") and dtype is torch.bfloat16 and not beside_amx:
        raise KernelsMissing("this CPU has AMX, which oneDNN uses")
    library = load_library(Path(__file__).parent, dtype, among)
    try:
        return NativeKernels(library, dtype, allocate)
    except AttributeError as error:
        raise KernelsMissing(f"the compiled kernels are of another version: {error}") from error
