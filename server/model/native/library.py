"""The compiled kernels, if they are there and this CPU can run them.

They are built with the package where a compiler is at hand (`pyproject.toml`), are a plain C library, and are
called with addresses and sizes: nothing of them depends on the version of torch. A machine that lacks them,
or lacks AVX-512 with bfloat16, computes the same with torch. So does one with AMX, whose matrix units oneDNN
uses and these kernels do not.
"""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

_PLACE = Path(__file__).parent

_ADDRESS, _SIZE, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class KernelsMissing(Exception):
    """The compiled kernels cannot be used; the message says why."""


class Kernels:
    """The library's functions. Tensors that are given to it are bfloat16 on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._packed_size = library.motet_packed_size
        self._packed_size.restype = _SIZE
        self._packed_size.argtypes = [_SIZE, _SIZE]
        self._pack = library.motet_pack
        self._unpack = library.motet_unpack
        self._pack.argtypes = self._unpack.argtypes = [_ADDRESS, _SIZE, _SIZE, _ADDRESS, _COUNT]
        self._linear = library.motet_linear
        self._linear.argtypes = [
            *(_ADDRESS, _SIZE, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE),
            *(_SIZE, _SIZE, _SIZE, _COUNT),
        ]

    def pack(self, weight: Tensor) -> Tensor:
        """[out, in] -> in the order that `linear` reads. `in` is even."""
        assert weight.dtype is torch.bfloat16
        assert weight.shape[1] % 2 == 0
        weight = weight.contiguous()
        packed = torch.empty(self._packed_size(*weight.shape), dtype=torch.bfloat16)
        self._pack(weight.data_ptr(), *weight.shape, packed.data_ptr(), torch.get_num_threads())
        return packed

    def unpack(self, packed: Tensor, num_out: int, num_in: int) -> Tensor:
        """The way back."""
        weight = torch.empty(num_out, num_in, dtype=torch.bfloat16)
        self._unpack(packed.data_ptr(), num_out, num_in, weight.data_ptr(), torch.get_num_threads())
        return weight

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, num_out: int) -> Tensor:
        """x [n, in] -> x W^T + bias [n, out]. Each row is computed alike, however many there are."""
        assert x.dtype is torch.bfloat16
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty(x.shape[0], num_out, dtype=torch.bfloat16)
        self._linear(
            x.data_ptr(),
            x.stride(0),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            num_out,
            x.shape[0],
            x.shape[1],
            num_out,
            torch.get_num_threads(),
        )
        return y


def load_kernels() -> Kernels:
    """Raises KernelsMissing."""
    if not _cpu_has("avx512_bf16"):
        raise KernelsMissing("this CPU has no AVX-512 with bfloat16")
    if _cpu_has("amx_tile"):
        raise KernelsMissing("this CPU has AMX, which oneDNN uses")
    for suffix in EXTENSION_SUFFIXES:
        path = _PLACE / f"_kernels{suffix}"
        if path.exists():
            try:
                return Kernels(ctypes.CDLL(str(path)))
            except (OSError, AttributeError) as error:
                raise KernelsMissing(f"the compiled kernels cannot be loaded: {error}") from error
    raise KernelsMissing("they were not compiled when this package was installed (that takes a C++ compiler)")


def _cpu_has(feature: str) -> bool:
    """torch has asked the CPU already; what it does not know is not there."""
    check = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return bool(check is not None and check())
