"""Pages that were taken ahead are memory like any other, and none of them is kept that nobody asked for."""

import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters.pages import HUGE_PAGE_BYTES
from server.model import pages_ahead
from server.model.cpu_kernels import KernelChoice, Quantization
from server.model.pages_ahead import PagesAhead, pages_for

MANY_BYTES = 96 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def wait_until_taken() -> None:
    for thread in threading.enumerate():
        if thread.name == "motet-pages":
            thread.join()


def held_of(ahead: PagesAhead, num_bytes: int) -> bool:
    """Whether so many bytes come out of these pages: two in a row lie side by side."""
    with ahead:
        first, second = (ahead.zeros(num_bytes // 2, torch.uint8) for _ in range(2))
    return second.data_ptr() - first.data_ptr() == num_bytes // 2


def test_zeros_lie_one_after_the_other_in_pages_that_are_there() -> None:
    before = resident_bytes()
    with PagesAhead(MANY_BYTES) as ahead:
        wait_until_taken()
        assert resident_bytes() - before > 0.9 * MANY_BYTES
        made = [ahead.zeros(100_000, dtype) for dtype in (torch.bfloat16, torch.uint8, torch.float32)]

    for number, tensor in enumerate(made, 1):
        assert tensor.shape == (100_000,)
        assert not tensor.any()
        tensor.fill_(number)
    assert [tensor.dtype for tensor in made] == [torch.bfloat16, torch.uint8, torch.float32]
    assert [int(tensor.sum(dtype=torch.float64)) for tensor in made] == [100_000, 200_000, 300_000]
    assert made[0].data_ptr() % HUGE_PAGE_BYTES == 0
    assert [tensor.data_ptr() % resource.getpagesize() for tensor in made] == [0, 0, 0]
    assert made[2].data_ptr() - made[0].data_ptr() == 200_704 + 102_400  # bytes, up to the next page


def test_what_nobody_asked_for_goes_back() -> None:
    before = resident_bytes()
    with PagesAhead(MANY_BYTES) as ahead:
        wait_until_taken()
        kept = ahead.zeros(10 << 20, torch.uint8).fill_(7)

    assert resident_bytes() - before < 0.5 * MANY_BYTES
    assert kept.eq(7).all()


def test_it_goes_back_after_an_error_too() -> None:
    def fail() -> None:
        with PagesAhead(MANY_BYTES):
            wait_until_taken()
            raise ZeroDivisionError

    before = resident_bytes()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert resident_bytes() - before < 0.5 * MANY_BYTES


def test_what_is_asked_for_while_pages_are_taken_is_not_written_to_again() -> None:
    """No thread is left that could."""
    with PagesAhead(8 * MANY_BYTES) as ahead:
        made = ahead.zeros(8 * MANY_BYTES, torch.uint8)
        assert "motet-pages" not in {thread.name for thread in threading.enumerate()}
        made[: MANY_BYTES : resource.getpagesize()].fill_(1)
    assert made[: MANY_BYTES : resource.getpagesize()].all()


def test_more_than_there_is_comes_from_elsewhere() -> None:
    with PagesAhead(1 << 20) as ahead:
        half = ahead.zeros(1 << 19, torch.uint8)
        large = ahead.zeros(1 << 20, torch.uint8)
        rest = ahead.zeros(1 << 19, torch.uint8)
        none = ahead.zeros(1, torch.uint8)
    late = ahead.zeros(5, torch.float32)

    assert rest.data_ptr() - half.data_ptr() == 1 << 19
    for tensor, size in ((large, 1 << 20), (none, 1), (late, 5)):
        assert tensor.shape == (size,)
        assert not tensor.fill_(1).eq(0).any()
    assert half.eq(0).all()
    assert rest.eq(0).all()


@pytest.mark.parametrize("size", [0, 1000])
def test_none_ahead(size: int) -> None:
    with PagesAhead(0) as ahead:
        assert not ahead.zeros(size, torch.bfloat16).any()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 Mi numbers in two files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for number, rows in enumerate((32, 64)):
        weights = {"large": torch.zeros(rows, 1 << 20, dtype=torch.uint8), "none": torch.zeros(0)}
        save_file(weights, folder / f"{number}.safetensors")
    return folder


@pytest.mark.parametrize(("quantization", "wanted"), [("none", 192 << 20), ("int8", 96 << 20)])
def test_as_much_as_the_weights_need(
    checkpoint: Path, quantization: Quantization, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages_ahead, "computes_bfloat16", lambda choice: True)
    assert held_of(pages_for(checkpoint, "cpu", "auto", quantization), wanted)
    assert not held_of(pages_for(checkpoint, "cpu", "auto", quantization), wanted + HUGE_PAGE_BYTES)


def test_no_more_than_half_of_what_the_machine_has_left(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages_ahead, "computes_bfloat16", lambda choice: True)
    monkeypatch.setattr(pages_ahead, "available_cpu_bytes", lambda: 256 << 20)
    assert held_of(pages_for(checkpoint, "cpu", "auto", "none"), 128 << 20)
    assert not held_of(pages_for(checkpoint, "cpu", "auto", "none"), 132 << 20)


@pytest.mark.parametrize("reason", ["kernels", "small", "gpu", "embedded", "broken", "missing"])
def test_none_where_nobody_would_ask_for_them(
    reason: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice: KernelChoice = "auto"
    quantization: Quantization = "none"
    folder: Path | None = checkpoint
    device = "auto" if reason == "gpu" else "cpu"
    if reason == "kernels":
        choice = "torch"
    else:
        monkeypatch.setattr(pages_ahead, "computes_bfloat16", lambda choice: True)
    if reason == "small":
        quantization = "int4"  # 48 MiB
    elif reason == "embedded":
        folder = None
    elif reason == "broken":
        folder = tmp_path
        (tmp_path / "model.safetensors").write_bytes(b"not one")
    elif reason == "missing":
        folder = tmp_path / "nowhere"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: reason == "gpu")

    assert not held_of(pages_for(folder, device, choice, quantization), 8 << 20)
