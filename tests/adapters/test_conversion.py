"""However the file is cut into slices, every number arrives, and the digest is that of all of them."""

import hashlib
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters import conversion
from adapters.conversion import Piece, convert
from adapters.errors import AdapterInvalid
from adapters.safetensors_file import SafetensorsFile

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def made(path: Path, seed: int) -> dict[str, Tensor]:
    """A file of tensors of all sorts and sizes, some of them empty."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{number}": torch.randn(chance.choice([0, 1, 3, 8, 40]), 5, generator=generator).to(
            chance.choice(DTYPES)
        )
        for number in range(12)
    }
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("slice_elements", [1, 7, 64, 100_000])
@pytest.mark.parametrize("seed", range(3))
def test_numbers_arrive_scaled_and_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slice_elements: int, seed: int
) -> None:
    monkeypatch.setattr(conversion, "_SLICE_ELEMENTS", slice_elements)
    tensors = made(tmp_path / "file", seed)
    with SafetensorsFile(tmp_path / "file") as file:
        stored = list(file.tensors)
        random.Random(seed).shuffle(stored)
        stored = stored[:9]  # the others leave holes in what is read
        places = [torch.full(one.shape, torch.nan, dtype=torch.bfloat16) for one in stored]
        places[::2] = [place.t().contiguous().t() for place in places[::2]]  # column by column
        scales = [1.0 if number % 2 else 0.375 * number for number in range(len(stored))]
        digest = convert(file, [Piece(*piece) for piece in zip(stored, places, scales, strict=True)])

    for one, place, scale in zip(stored, places, scales, strict=True):
        assert torch.equal(place, (tensors[one.name].float() * scale).to(torch.bfloat16))
    body = b"".join(
        tensors[one.name].view(torch.uint8).numpy().tobytes() for one in file.tensors if one in stored
    )
    assert digest == hashlib.sha256(body).digest()


def pieces_of(file: SafetensorsFile, dtype: torch.dtype, scaling: float = 1.0) -> list[Piece]:
    return [Piece(one, torch.empty(one.shape, dtype=dtype), scaling) for one in file.tensors]


@pytest.mark.parametrize(
    ("bad", "dtype", "scaling"),
    [
        (torch.nan, torch.float32, 1.0),
        (torch.inf, torch.float32, 0.0),
        (-torch.inf, torch.bfloat16, 1.0),
        (2.0**41, torch.float32, 1.0),
        (-(2.0**39), torch.float32, -4.0),
        (70_000.0, torch.float16, 1.0),
        (40_000.0, torch.float16, 2.0),
    ],
)
def test_the_tensor_that_cannot_be_served_is_named(
    tmp_path: Path, bad: float, dtype: torch.dtype, scaling: float
) -> None:
    """It shares its slice with others."""
    tensors = {name: torch.ones(4, 5) for name in ("first", "second", "third")}
    tensors["second"][2, 3] = bad
    save_file(tensors, tmp_path / "file")

    with SafetensorsFile(tmp_path / "file") as file, pytest.raises(AdapterInvalid, match="second"):
        convert(file, pieces_of(file, dtype, scaling))


def test_values_at_the_limit_are_served(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([[65504.0, -65504.0]])}, tmp_path / "file")

    with SafetensorsFile(tmp_path / "file") as file:
        pieces = pieces_of(file, torch.float16)
        convert(file, pieces)

    assert pieces[0].place.tolist() == [[65504.0, -65504.0]]


def test_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100, 100)}, tmp_path / "file")

    with SafetensorsFile(tmp_path / "file") as file:
        os.truncate(tmp_path / "file", 20_000)
        with pytest.raises(AdapterInvalid, match="cut short"):
            convert(file, pieces_of(file, torch.float32))


def test_file_that_grows_or_changes_while_it_is_read_is_what_was_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 4)}, tmp_path / "file")

    with SafetensorsFile(tmp_path / "file") as file:
        with open(tmp_path / "file", "r+b") as other:
            other.seek(-64, os.SEEK_END)
            other.write(torch.full((16,), 3.0).numpy().tobytes() * 5)
        pieces = pieces_of(file, torch.float32)
        digest = convert(file, pieces)

    assert pieces[0].place.eq(3.0).all()
    assert digest == hashlib.sha256(pieces[0].place.numpy().tobytes()).digest()
