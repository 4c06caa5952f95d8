"""Memory in pages of its own is memory like any other."""

import gc
import mmap
import weakref

import pytest
import torch

from adapters import pages
from adapters.pages import HUGE_PAGE_BYTES, zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "num_bytes", [4, 100_000, HUGE_PAGE_BYTES - 4, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 4]
)
def test_zeros_of_any_length(num_bytes: int, dtype: torch.dtype) -> None:
    made = zeros(num_bytes // dtype.itemsize, dtype)

    assert made.shape == (num_bytes // dtype.itemsize,)
    assert made.dtype is dtype
    assert not made.any()
    made.fill_(1.0)
    assert made.eq(1.0).all()
    if num_bytes >= HUGE_PAGE_BYTES:
        assert made.data_ptr() % HUGE_PAGE_BYTES == 0


@pytest.mark.parametrize("num_elements", [100_000, HUGE_PAGE_BYTES])
def test_views_keep_the_memory_and_the_last_one_gives_it_back(
    num_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mappings: list[weakref.ref[mmap.mmap]] = []

    class Watched(mmap.mmap):
        def __init__(self, *arguments: object, **named: object) -> None:
            mappings.append(weakref.ref(self))

    monkeypatch.setattr(pages.mmap, "mmap", Watched)
    made = zeros(num_elements, torch.float32)
    view = made[100:200].fill_(7.0)
    del made
    gc.collect()
    assert view.eq(7.0).all()
    assert mappings[0]() is not None

    del view
    gc.collect()
    assert mappings[0]() is None


@pytest.mark.parametrize("refusal", ["error", "unknown"])
def test_a_system_without_them_gives_ordinary_pages(refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if refusal == "unknown":
        monkeypatch.setattr(pages, "_ADVICE", None)
    else:
        monkeypatch.setattr(pages, "_ADVICE", 12345)  # no advice that a system knows: EINVAL

    assert not zeros(HUGE_PAGE_BYTES, torch.bfloat16).any()
