"""The numbers of a safetensors file, on their way into an adapter's run.

    file    | A of q | B of q    | A of k | ...        in the file's order, stored dtype
            [ a slice      ][ a slice       ][ ...     read, hashed and widened to float32 in buffers that
                                                       stay in a core's cache
    run     each part of a slice, times its scale, in the served dtype, in its own place; B column by column

A loader shares the interpreter with the thread that computes for everybody (see `server.threads`). Each call
that lets go of the interpreter takes it back afterwards, and that is when the other thread may have to wait:
so calls are few and long. The unit is the slice and not the tensor: an adapter of 336 tensors is 35 slices of
half a dozen calls.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from adapters.errors import AdapterInvalid
from adapters.names import shown
from adapters.safetensors_file import ITEM_BYTES, SafetensorsFile, StoredTensor

MAX_MAGNITUDE = 2.0**40
"""No trained adapter comes near, and what it adds to a sane hidden state is still a number."""

_SLICE_ELEMENTS = 256 * 1024  # float32: 1 MiB, about a core's second-level cache
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A tensor of the file and where its numbers go."""

    stored: StoredTensor
    place: Tensor  # of its shape, served dtype; row by row, or a matrix that lies column by column
    scaling: float = 1.0  # applied in float32, before the numbers are rounded

    def cut(self, start: int, room: int) -> int:
        """Where a part of at most `room` elements ends that begins at `start`."""
        stop = min(self.stored.num_elements, start + room)
        if self.place.is_contiguous():
            return stop
        in_row = start % self.place.shape[1]
        row_end = start - in_row + self.place.shape[1]
        if in_row or stop < row_end:
            return min(stop, row_end)
        return stop - stop % self.place.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The elements [start, stop) of a piece: any, or whole rows or a share of one if it lies in columns."""

    piece: Piece
    start: int
    stop: int

    @property
    def place(self) -> Tensor:
        """Where they go."""
        place = self.piece.place
        if place.is_contiguous():
            return place.view(-1)[self.start : self.stop]
        row, at = divmod(self.start, place.shape[1])
        num_rows = (self.stop - self.start) // place.shape[1]
        return place[row : row + num_rows] if num_rows else place[row, at : at + self.stop - self.start]


def convert(file: SafetensorsFile, pieces: Sequence[Piece]) -> bytes:
    """Read all pieces into their places. A digest of their stored bytes, in the order of the file.

    Raises AdapterInvalid for a file that has become shorter and for numbers that cannot be served.
    """
    digest = hashlib.sha256()  # twice as fast as blake2b where processors help
    num_elements = min(_SLICE_ELEMENTS, sum(piece.stored.num_elements for piece in pieces))
    widest = max((ITEM_BYTES[piece.stored.dtype] for piece in pieces), default=0)
    content = memoryview(bytearray(num_elements * widest))
    widened = torch.empty(num_elements, dtype=torch.float32)
    for parts in _slices(pieces):
        raw = _read(file, parts, content)
        digest.update(raw)
        values = widened[: _num_elements(parts)]
        values.copy_(torch.frombuffer(raw, dtype=DTYPES[parts[0].piece.stored.dtype]))
        _place(parts, values)
    return digest.digest()


def _slices(pieces: Sequence[Piece]) -> Iterator[list[_Part]]:
    """Parts that lie one behind the other in the file and have one dtype, a slice's worth at a time."""
    in_file = sorted(pieces, key=lambda piece: piece.stored.start)
    for _, alike in groupby(in_file, key=lambda piece: piece.stored.dtype):
        parts: list[_Part] = []
        room, end = _SLICE_ELEMENTS, -1
        for piece in alike:
            if parts and piece.stored.start != end:
                yield parts
                parts, room = [], _SLICE_ELEMENTS
            start, num_elements, end = 0, piece.stored.num_elements, piece.stored.stop
            while start < num_elements:
                stop = piece.cut(start, room)
                parts.append(_Part(piece, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    yield parts
                    parts, room = [], _SLICE_ELEMENTS
        if parts:
            yield parts


def _num_elements(parts: list[_Part]) -> int:
    return sum(part.stop - part.start for part in parts)


def _read(file: SafetensorsFile, parts: list[_Part], content: memoryview) -> memoryview:
    stored = parts[0].piece.stored
    item_bytes = ITEM_BYTES[stored.dtype]
    raw = content[: _num_elements(parts) * item_bytes]
    file.read_into(raw, stored.start + parts[0].start * item_bytes)
    return raw


def _place(parts: list[_Part], values: Tensor) -> None:
    """Scale in place, round into the run, look at the result."""
    is_safe = _are_small(values, parts)
    places = [part.place for part in parts]
    shares = list(torch.split(values, [part.stop - part.start for part in parts]))
    scaled = [number for number, part in enumerate(parts) if part.piece.scaling != 1.0]
    if scaled:
        torch._foreach_mul_(
            [shares[number] for number in scaled], [parts[number].piece.scaling for number in scaled]
        )
    shaped = [share.view(place.shape) for share, place in zip(shares, places, strict=True)]
    torch._foreach_copy_(places, shaped)  # one call where a loop would make dozens
    if not is_safe:
        for part, place in zip(parts, places, strict=True):
            check_values(place, part.piece.stored)


def _are_small(values: Tensor, parts: list[_Part]) -> bool:
    """Whether all is well, seen from the largest number and the largest scale. NaN is not."""
    low, high = (float(value) for value in values.aminmax())
    scaling = max(abs(part.piece.scaling) for part in parts)
    limit = min(MAX_MAGNITUDE, torch.finfo(parts[0].piece.place.dtype).max)
    return max(-low, high) * scaling <= limit  # False for NaN, which wins in aminmax


def check_values(values: Tensor, stored: StoredTensor) -> None:
    """As served: float16 may overflow where the file did not. Raises AdapterInvalid."""
    low, high = (float(value) for value in values.aminmax())
    largest = max(-low, high)  # NaN wins in aminmax, and then no comparison holds
    if not largest < float("inf") or not low > float("-inf"):
        raise AdapterInvalid(
            f"tensor {shown(stored.name)} holds NaN or infinite values, as stored or in the served dtype"
        )
    if largest > MAX_MAGNITUDE:
        raise AdapterInvalid(
            f"tensor {shown(stored.name)} holds values as large as {largest:.1e}; that is no trained adapter"
        )
