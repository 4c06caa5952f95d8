"""The functions of the library (`lora.h`), and the tables that they read.

    adapter   a table [targets] of addresses: where A, B, gain and bias of each lie
    step      a group for each adapter and scale: its table, and which tokens are its

A table is made once for each adapter, a step once for all layers, so that a layer costs one call.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapters.kernels.native.compiled import (
    INSTRUCTION_SETS,
    InstructionSet,
    KernelsMissing,
    load_library,
    name_of,
)
from adapters.run import AdapterViews
from adapters.types import TargetId

_ADDRESS, _SIZE, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class _Terms(ctypes.Structure):
    _fields_ = (
        ("a", _ADDRESS),
        ("b", _ADDRESS),
        ("gain", _ADDRESS),
        ("bias", _ADDRESS),
        ("rank", _SIZE),
    )


class _Group(ctypes.Structure):
    _fields_ = (
        ("terms", _ADDRESS),
        ("num_terms", _SIZE),
        ("first", _SIZE),
        ("count", _SIZE),
        ("scale", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (("groups", _ADDRESS), ("num_groups", _SIZE), ("tokens", _ADDRESS))


class _Product(ctypes.Structure):
    _fields_ = (
        ("x", _ADDRESS),
        ("x_stride", _SIZE),
        ("y", _ADDRESS),
        ("y_stride", _SIZE),
        ("num_in", _SIZE),
        ("num_out", _SIZE),
    )


class AdapterTable:
    """Where all that an adapter has for linear layers lies. It keeps that alive."""

    __slots__ = ("num_targets", "terms", "views")

    def __init__(self, views: AdapterViews) -> None:
        self.views = views
        self.num_targets = 1 + max(views.linears, default=-1)
        self.terms = (_Terms * self.num_targets)()
        for target, mine in views.linears.items():
            assert mine.a.is_contiguous(), "A lies row by row"
            assert mine.b.t().is_contiguous(), "and B column by column"
            self.terms[target] = _Terms(
                mine.a.data_ptr(),
                mine.b.data_ptr(),
                None if mine.gain is None else mine.gain.data_ptr(),
                None if mine.bias is None else mine.bias.data_ptr(),
                mine.a.shape[0],
            )


class NativeStep:
    """Which tokens of a step use which adapter. It keeps alive what it points to."""

    __slots__ = ("_groups", "_step", "_tables", "_tokens", "address")

    def __init__(self, groups: Sequence[tuple[AdapterTable, float, Sequence[tuple[int, int]]]]) -> None:
        """`groups`: an adapter, its scale, and the spans [start, stop) of its tokens."""
        tokens: list[int] = []
        self._tables = [table for table, _, _ in groups]
        self._groups = (_Group * len(groups))()
        for index, (table, scale, spans) in enumerate(groups):
            first = len(tokens)
            for span in spans:
                tokens.extend(range(*span))
            self._groups[index] = _Group(
                ctypes.addressof(table.terms), table.num_targets, first, len(tokens) - first, scale
            )
        self._tokens = torch.tensor(tokens, dtype=torch.int64)
        self._step = _Step(ctypes.addressof(self._groups), len(groups), self._tokens.data_ptr())
        self.address = ctypes.addressof(self._step)


class NativeLora:
    """The library's function for one dtype, which all tensors have. All are on the CPU."""

    def __init__(self, dtype: torch.dtype, among: Sequence[InstructionSet] = INSTRUCTION_SETS) -> None:
        """For the first of some instruction sets that there is. Raises KernelsMissing."""
        self.dtype = dtype
        library = load_library(Path(__file__).parent, dtype, among)
        try:
            self._add_lora = getattr(library.functions, f"motet_add_lora_{name_of(dtype)}")
        except AttributeError as error:
            raise KernelsMissing(f"the compiled kernels are of another version: {error}") from error
        self._add_lora.argtypes = [_ADDRESS, _SIZE, _ADDRESS, _COUNT]
        self._add_lora.restype = None

    def add(self, step: NativeStep, target: TargetId, x: Tensor, y: Tensor) -> None:
        """y [T, O] += what the step's adapters have for inputs x [T, I] of the target, in place."""
        assert x.dtype is y.dtype is self.dtype
        assert x.stride(1) == y.stride(1) == 1
        product = _Product(x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), x.shape[1], y.shape[1])
        self._add_lora(step.address, target, ctypes.byref(product), torch.get_num_threads())
