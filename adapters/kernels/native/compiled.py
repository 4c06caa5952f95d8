"""Compiled kernels: which dtypes they compute in, what they ask of the CPU, and where they are.

They are built with the package where a compiler is at hand (`pyproject.toml`), once for each instruction set.
They are plain C libraries, and are called with addresses and sizes: nothing of them depends on the version of
torch. A machine that lacks them, or has none of the instruction sets, computes the same with torch.
"""

import ctypes
import platform
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal, NamedTuple

import torch

TUPLE_SIZES = {torch.bfloat16: 2, torch.float32: 1}
"""The dtypes that there are kernels for, and how many inputs are multiplied at once for each sum."""

InstructionSet = Literal["avx512", "avx2"]
INSTRUCTION_SETS: tuple[InstructionSet, ...] = ("avx512", "avx2")
"""Those that there are kernels for, the best first."""

INSTRUCTIONS_IN_WORDS: dict[InstructionSet, str] = {"avx512": "AVX-512", "avx2": "AVX2"}

_FEATURES: dict[InstructionSet, str] = {"avx512": "avx512_bf16", "avx2": "avx2"}  # as torch calls them
_FEATURES_IN_WORDS: dict[InstructionSet, str] = {"avx512": "AVX-512 with bfloat16", "avx2": "AVX2"}


_NOT_COMPILED = "they were not compiled when this package was installed (that takes a C++ compiler)"


class KernelsMissing(Exception):
    """The compiled kernels cannot be used; the message says why."""


class Library(NamedTuple):
    """Compiled kernels, what they ask of the CPU, and why not better ones that it could run; empty: these are
    the best.
    """

    functions: ctypes.CDLL
    instructions: InstructionSet
    why: str


def load_library(
    folder: Path, dtype: torch.dtype, among: Sequence[InstructionSet] = INSTRUCTION_SETS
) -> Library:
    """The library of a folder that has functions for the dtype, for the first of some instruction sets.

    Raises KernelsMissing.
    """
    if dtype not in TUPLE_SIZES:
        raise KernelsMissing(f"there are none for {name_of(dtype)}")
    if not is_x86():
        raise KernelsMissing(f"they are for x86, and this is {platform.machine()}")
    known = [instructions for instructions in among if _runs(instructions)]
    if not known:
        wanted = " or ".join(_FEATURES_IN_WORDS[instructions] for instructions in among)
        raise KernelsMissing(f"this CPU has no {wanted}")
    why = ""
    for instructions in known:
        path = next(
            filter(Path.exists, (folder / f"_{instructions}{end}" for end in EXTENSION_SUFFIXES)), None
        )
        if path is None:
            why = why or _NOT_COMPILED
            continue
        try:
            return Library(ctypes.CDLL(str(path)), instructions, why)
        except OSError as error:
            why = why or f"the compiled kernels cannot be loaded: {error}"
    raise KernelsMissing(why)


def _runs(instructions: InstructionSet) -> bool:
    """Of a CPU that torch calls AVX2's it knows that it has FMA as well."""
    if instructions == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    return cpu_has(_FEATURES[instructions])


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def name_of(dtype: torch.dtype) -> str:
    """As the functions' names end."""
    return str(dtype).removeprefix("torch.")


def cpu_has(feature: str) -> bool:
    """torch has asked the CPU already; what it does not know is not there."""
    check = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return bool(check is not None and check())
