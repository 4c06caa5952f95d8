"""Which compiled kernels are taken: the best that this CPU runs and that are there, and it is told why."""

import platform
from pathlib import Path

import pytest
import torch

from adapters.kernels.native import compiled
from adapters.kernels.native.compiled import INSTRUCTION_SETS, InstructionSet, KernelsMissing, load_library

FOLDER = Path(compiled.__file__).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With what was compiled here, to take some of it away; skips where nothing was."""
    found = [file for each in INSTRUCTION_SETS for file in FOLDER.glob(f"_{each}.*.so")]
    if len(found) < len(INSTRUCTION_SETS):
        pytest.skip("nothing was compiled")
    for file in found:
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def cpu_with(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    monkeypatch.setattr(compiled, "cpu_has", lambda feature: feature in features)
    capability = "AVX512" if "avx512_bf16" in features else "AVX2" if "avx2" in features else "DEFAULT"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


def take_away(folder: Path, instructions: InstructionSet) -> None:
    (file,) = folder.glob(f"_{instructions}.*.so")
    file.unlink()


@pytest.mark.parametrize(
    ("features", "taken"),
    [(("avx512_bf16", "avx2"), "avx512"), (("avx2",), "avx2"), (("amx_tile", "avx2"), "avx2")],
)
def test_the_best_that_the_cpu_runs(
    monkeypatch: pytest.MonkeyPatch, folder: Path, features: tuple[str, ...], taken: str
) -> None:
    cpu_with(monkeypatch, *features)
    library = load_library(folder, torch.bfloat16)
    assert (library.instructions, library.why) == (taken, "")


def test_what_is_not_there_is_passed_over_and_told(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cpu_with(monkeypatch, "avx512_bf16", "avx2")
    take_away(folder, "avx512")
    library = load_library(folder, torch.float32)
    assert library.instructions == "avx2"
    assert "were not compiled" in library.why
    take_away(folder, "avx2")
    with pytest.raises(KernelsMissing, match="were not compiled"):
        load_library(folder, torch.float32)


def test_what_cannot_be_loaded_is_passed_over_and_told(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cpu_with(monkeypatch, "avx512_bf16", "avx2")
    (file,) = folder.glob("_avx512.*.so")
    file.unlink()
    file.write_bytes(b"of another machine")
    library = load_library(folder, torch.bfloat16)
    assert library.instructions == "avx2"
    assert "cannot be loaded" in library.why


def test_a_cpu_without_them_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cpu_with(monkeypatch)
    with pytest.raises(KernelsMissing, match="this CPU has no AVX-512 with bfloat16 or AVX2"):
        load_library(folder, torch.bfloat16)
    with pytest.raises(KernelsMissing, match="this CPU has no AVX2"):
        load_library(folder, torch.bfloat16, ("avx2",))
    with pytest.raises(KernelsMissing, match="float16"):
        load_library(folder, torch.float16)


def test_another_kind_of_machine_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cpu_with(monkeypatch, "avx512_bf16", "avx2")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(KernelsMissing, match="they are for x86, and this is aarch64"):
        load_library(folder, torch.float32)
