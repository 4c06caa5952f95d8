"""Reading a safetensors file that may be hostile, one tensor at a time.

    [ 8 bytes: N, little-endian ][ N bytes: JSON header ][ tensor bytes, no holes, no overlaps ]

Why not the library's reader: it maps the file, and a mapped file that is cut short while it is read kills
the process with SIGBUS. Here every byte is read by `read`, after the header alone has said how many there
will be; a short read is an error like any other. Nothing is allocated before its size is known to be
wanted.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from adapters.errors import AdapterInvalid
from adapters.names import shown
from adapters.regular_file import open_regular
from adapters.strict_json import parse_object

_MAX_HEADER_BYTES = 4 * 1024 * 1024
_MAX_DIMENSIONS = 8
_PREFIX_BYTES = 8
ITEM_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is: bytes [start, stop) of the file."""

    name: str
    dtype: str  # F64, F32, F16 or BF16
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        return (self.stop - self.start) // ITEM_BYTES[self.dtype]


class SafetensorsFile:
    """An open file whose header has been checked. A context manager."""

    def __init__(self, path: Path) -> None:
        """Raises AdapterInvalid."""
        self._name = path.name
        try:
            self._file = open_regular(path)
        except FileNotFoundError as error:
            raise AdapterInvalid(f"the adapter has no {path.name}") from error
        try:
            self._num_bytes = os.fstat(self._file.fileno()).st_size
            self.tensors: tuple[StoredTensor, ...] = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read_into(self, content: memoryview, start: int) -> None:
        """Fill `content` with the bytes from `start` on: numbers are little-endian, row-major.

        Raises AdapterInvalid if the file has become shorter than it was.
        """
        done = 0
        try:
            self._file.seek(start)
            while done < len(content):
                count = self._file.readinto(content[done:])
                if not count:
                    raise AdapterInvalid(f"{self._name} is cut short")
                done += count
        except OSError as error:
            raise AdapterInvalid(f"{self._name} cannot be read") from error

    def read(self, tensor: StoredTensor) -> bytearray:
        """All of a tensor's bytes. Raises AdapterInvalid."""
        return self._read(tensor.start, tensor.stop)

    def _read(self, start: int, stop: int) -> bytearray:
        content = bytearray(stop - start)
        self.read_into(memoryview(content), start)
        return content

    def _read_header(self) -> tuple[StoredTensor, ...]:
        if self._num_bytes < _PREFIX_BYTES:
            raise AdapterInvalid(f"{self._name} is not a safetensors file: it has {self._num_bytes} bytes")
        length = int.from_bytes(self._read(0, _PREFIX_BYTES), "little")
        begin = _PREFIX_BYTES + length
        if length > _MAX_HEADER_BYTES or begin > self._num_bytes:
            raise AdapterInvalid(f"{self._name} is not a safetensors file, or its header is too long")
        header = parse_object(self._read(_PREFIX_BYTES, begin), f"the header of {self._name}")
        header.pop("__metadata__", None)
        tensors = [self._entry(name, entry, begin) for name, entry in header.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
        self._check_layout(tensors, begin)
        return tuple(tensors)

    def _entry(self, name: str, entry: object, begin: int) -> StoredTensor:
        if not isinstance(entry, dict):
            raise AdapterInvalid(f"tensor {shown(name)} has no proper entry in the header of {self._name}")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise AdapterInvalid(
                f"tensor {shown(name)} has dtype {shown(dtype)}; floating-point numbers are served"
            )
        if not _are_sizes(shape, _MAX_DIMENSIONS) or not _are_sizes(offsets, 2) or len(offsets) != 2:
            raise AdapterInvalid(
                f"tensor {shown(name)} has no proper shape or offsets in the header of {self._name}"
            )
        num_bytes = ITEM_BYTES[dtype]
        for size in shape:
            num_bytes *= size
        if offsets[1] - offsets[0] != num_bytes or begin + offsets[1] > self._num_bytes:
            raise AdapterInvalid(
                f"the bytes of tensor {shown(name)} do not fit its shape, or {self._name} is cut short"
            )
        return StoredTensor(name, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])

    def _check_layout(self, tensors: list[StoredTensor], begin: int) -> None:
        """As the format demands: one after the other, up to the end of the file."""
        end = begin
        for tensor in tensors:
            if tensor.start != end:
                raise AdapterInvalid(f"tensor {shown(tensor.name)} overlaps another one, or leaves a hole")
            end = tensor.stop
        if end != self._num_bytes:
            raise AdapterInvalid(f"{self._name} has bytes that belong to no tensor")


def _are_sizes(value: object, most: int) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(item) is int and 0 <= item < 2**62 for item in value)
    )
