"""Which kernels compute on a CPU, by what the operator chose and the machine has.

    native   our own kernels, for AVX-512 with bfloat16 or else for AVX2, compiled with the package
    avx2     those for AVX2, also where there is better
    onednn   torch's, through operators that are not documented
    torch    none: F.linear

"auto" takes the first of them that there is, and each falls back on the next for single weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from adapters import pages
from adapters.host_memory import Allocate
from adapters.kernels.native.compiled import (
    INSTRUCTION_SETS,
    INSTRUCTIONS_IN_WORDS,
    InstructionSet,
    KernelsMissing,
)
from server.model.errors import ModelNotSupported
from server.model.native.bindings import NativeKernels, load_kernels
from server.model.native.linear import NativeLayout, QuantizedLayout
from server.model.onednn_linear import OneDnnLayout
from server.model.packed_linear import Layout

KernelChoice = Literal["auto", "native", "avx2", "onednn", "torch"]
Quantization = Literal["none", "int8", "int4"]
CacheChoice = Literal["auto", "int8"]  # of keys and values; auto: what the model computes in
BITS = {"none": 16, "int8": 8, "int4": 4}
"""Of a weight as it lies in memory, at the least: there are scales beside few of them, and float32."""


@dataclass(frozen=True, slots=True)
class CpuKernels:
    """What a model is computed with."""

    layouts: tuple[Layout, ...]  # of its weights, the best first
    head_layouts: tuple[Layout, ...]  # of the output matrix
    native: NativeKernels | None  # our own, for attention too
    words: str  # for whoever starts the server: which kernels, and why not better ones


def native_instructions(choice: KernelChoice) -> Sequence[InstructionSet]:
    """Which of our own kernels the operator allows; empty: none."""
    if choice == "avx2":
        return ("avx2",)
    return INSTRUCTION_SETS if choice in ("auto", "native") else ()


def computes_bfloat16(choice: KernelChoice) -> bool:
    """Whether our own kernels make up for what a CPU lacks, as AVX2 does."""
    try:
        load_kernels(torch.bfloat16, native_instructions(choice))
    except KernelsMissing:
        return False
    return True


def pick_kernels(
    choice: KernelChoice,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    *,
    allocate: Allocate = pages.zeros,
) -> CpuKernels:
    """For a CPU. `allocate` makes the memory of weights that our own kernels read. Raises ModelNotSupported
    if what was chosen by name is not there.
    """
    if quantization != "none":
        return _pick_quantized(choice, dtype, quantization, allocate)
    if choice == "torch":
        return CpuKernels((), (), None, "torch's, as chosen")
    onednn: tuple[Layout, ...] = (OneDnnLayout(),) if OneDnnLayout.takes(dtype) else ()
    if choice == "onednn":
        if not onednn:
            raise ModelNotSupported(f"--cpu-kernels onednn: this machine has none for {_name(dtype)}")
        return CpuKernels(onednn, onednn, None, "oneDNN's, as chosen")
    try:
        among = native_instructions(choice)
        native = load_kernels(dtype, among, beside_amx=choice != "auto", allocate=allocate)
    except KernelsMissing as missing:
        if choice != "auto":
            raise ModelNotSupported(f"--cpu-kernels {choice}: {missing}") from missing
        whose = "oneDNN's" if onednn else "torch's"
        return CpuKernels(onednn, onednn, None, f"{whose}; not our own, because {missing}")
    layouts = NativeLayout(native), *onednn
    return CpuKernels(layouts, layouts, native, _own(native))


def _pick_quantized(
    choice: KernelChoice, dtype: torch.dtype, quantization: Quantization, allocate: Allocate
) -> CpuKernels:
    """Only our own kernels compute with weights of few bits. The head, which decides between words that are
    nearly alike, has 8 at least.
    """
    flag = f"--quantization {quantization}"
    if not native_instructions(choice):
        raise ModelNotSupported(f"{flag} needs our own kernels, not --cpu-kernels {choice}")
    try:
        native = load_kernels(dtype, native_instructions(choice), beside_amx=True, allocate=allocate)
    except KernelsMissing as missing:
        raise ModelNotSupported(f"{flag} needs our own kernels: {missing}") from missing
    bits, plain = BITS[quantization], NativeLayout(native)
    return CpuKernels(
        (QuantizedLayout(native, bits), plain),
        (QuantizedLayout(native, 8), plain),
        native,
        f"{_own(native)}, weights of {bits} bits",
    )


def _own(native: NativeKernels) -> str:
    better = f"; of better ones: {native.why}" if native.why else ""
    return f"our own ({INSTRUCTIONS_IN_WORDS[native.instructions]}{better})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
