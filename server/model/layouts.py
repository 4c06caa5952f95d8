"""Which layouts of weights are tried, in which order, by what the operator chose and the machine has.

    native   our own kernels: on a CPU with AVX-512 and bfloat16, compiled with the package
    onednn   torch's, through operators that are not documented
    torch    none: F.linear

"auto" takes the first of them that there is, and each falls back on the next for single weights.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from server.model.errors import ModelNotSupported
from server.model.native.library import Kernels, KernelsMissing, load_kernels
from server.model.native.linear import NativeLayout
from server.model.onednn_linear import OneDnnLayout
from server.model.packed_linear import Layout

CpuKernels = Literal["auto", "native", "onednn", "torch"]


@dataclass(frozen=True, slots=True)
class Layouts:
    """What weights may look like, the best first."""

    layouts: tuple[Layout, ...]
    native: Kernels | None  # our own, where they are there; attention has some too
    words: str  # for whoever starts the server: which kernels, and why not better ones


def pick_layouts(choice: CpuKernels, dtype: torch.dtype) -> Layouts:
    """For a CPU. Raises ModelNotSupported if what was chosen by name is not there."""
    if choice == "torch":
        return Layouts((), None, "torch's, as chosen")
    onednn: tuple[Layout, ...] = (OneDnnLayout(),) if OneDnnLayout.takes(dtype) else ()
    if choice == "onednn":
        if not onednn:
            raise ModelNotSupported(f"--cpu-kernels onednn: this machine has none for {_name(dtype)}")
        return Layouts(onednn, None, "oneDNN's, as chosen")
    try:
        native = load_kernels(dtype)
    except KernelsMissing as missing:
        if choice == "native":
            raise ModelNotSupported(f"--cpu-kernels native: {missing}") from missing
        return Layouts(onednn, None, f"{'oneDNN' if onednn else 'torch'}'s; not our own, because {missing}")
    return Layouts((NativeLayout(native), *onednn), native, "our own (AVX-512)")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
