"""The compiled kernels, if they are there and this CPU can run them.

They are built with the package where a compiler is at hand (`pyproject.toml`), are a plain C library, and are
called with addresses and sizes: nothing of them depends on the version of torch. A machine that lacks them,
or lacks AVX-512 with bfloat16, computes the same with torch. So does one with AMX, whose matrix units oneDNN
uses and these kernels do not.
"""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_PLACE = Path(__file__).parent

_ADDRESS, _SIZE, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class SequenceRow(NamedTuple):
    """A sequence of a step, as attention sees it."""

    token: int  # its first in the step
    num_queries: int  # the last ones of its keys
    num_keys: int
    table: int  # where its blocks begin among those of all


class _Heads(ctypes.Structure):
    """[heads, tokens, dim] in whatever order; dim is adjacent."""

    _fields_ = (("data", _ADDRESS), ("token_stride", _SIZE), ("head_stride", _SIZE))

    @classmethod
    def of(cls, tensor: Tensor) -> "_Heads":
        return cls(tensor.data_ptr(), tensor.stride(1), tensor.stride(0))


class _Cache(ctypes.Structure):
    _fields_ = (
        ("keys", _ADDRESS),
        ("values", _ADDRESS),
        ("block_size", _SIZE),
        ("num_kv_heads", _SIZE),
        ("key_dim", _SIZE),
        ("value_dim", _SIZE),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("q", _Heads),
        ("out", _ADDRESS),
        ("cache", _Cache),
        ("blocks", _ADDRESS),
        ("num_heads", _SIZE),
        ("window", _SIZE),
        ("scale", ctypes.c_float),
    )


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
        self._attend = library.motet_attend
        self._attend.argtypes = [_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _COUNT]

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
        x = _with_adjacent_rows(x)
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

        `keys` and `values` are the cache of a layer (`native.attention`). `places` int64 [T], `sequences`
        int64 [n, 4] of SequenceRow, `blocks` int32. A query sees the last `window` keys up to its own;
        None: all.
        """
        num_heads, num_tokens, key_dim = query.shape
        query, key, value = map(_with_adjacent_rows, (query, key, value))
        out = torch.empty(num_tokens, num_heads, value.shape[2], dtype=torch.bfloat16)
        cache = _Cache(
            keys.data_ptr(), values.data_ptr(), keys.shape[3], keys.shape[1], key_dim, value.shape[2]
        )
        attention = _Attention(
            _Heads.of(query), out.data_ptr(), cache, blocks.data_ptr(), num_heads, window or 0, scale
        )
        self._attend(
            ctypes.byref(attention),
            ctypes.byref(_Heads.of(key)),
            ctypes.byref(_Heads.of(value)),
            places.data_ptr(),
            num_tokens,
            sequences.data_ptr(),
            sequences.shape[0],
            torch.get_num_threads(),
        )
        return out


def _with_adjacent_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


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
