"""Compiled kernels: which dtypes they compute in, what they ask of the CPU, and where they are.

They are built with the package where a compiler is at hand (`pyproject.toml`), are plain C libraries, and are
called with addresses and sizes: nothing of them depends on the version of torch. A machine that lacks them,
or lacks AVX-512 with bfloat16, computes the same with torch.
"""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

TUPLE_SIZES = {torch.bfloat16: 2, torch.float32: 1}
"""The dtypes that there are kernels for, and how many inputs are multiplied at once for each sum."""


class KernelsMissing(Exception):
    """The compiled kernels cannot be used; the message says why."""


def load_library(folder: Path, dtype: torch.dtype) -> ctypes.CDLL:
    """The library `_kernels` of a folder, which has functions for the dtype. Raises KernelsMissing."""
    if dtype not in TUPLE_SIZES:
        raise KernelsMissing(f"there are none for {name_of(dtype)}")
    if not cpu_has("avx512_bf16"):
        raise KernelsMissing("this CPU has no AVX-512 with bfloat16")
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_kernels{suffix}"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                raise KernelsMissing(f"the compiled kernels cannot be loaded: {error}") from error
    raise KernelsMissing("they were not compiled when this package was installed (that takes a C++ compiler)")


def name_of(dtype: torch.dtype) -> str:
    """As the functions' names end."""
    return str(dtype).removeprefix("torch.")


def cpu_has(feature: str) -> bool:
    """torch has asked the CPU already; what it does not know is not there."""
    check = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return bool(check is not None and check())
