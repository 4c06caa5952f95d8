"""How much a remote adapter may cost: bytes, files and seconds, counted before anything is downloaded."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from adapters.errors import AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from adapters.sources.files import ADAPTER_FILES, refuse_pickle_names
from adapters.spec import CONFIG_FILE
from adapters.types import Clock

_RETRY_AFTER_S = 30


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What one adapter may take."""

    max_bytes: int  # of its files together
    max_files: int  # in its folder or repository, fetched or not
    seconds: float  # from the first question of a fetch to the last byte


@dataclass(frozen=True, slots=True)
class Checksum:
    """What a file's bytes must hash to. "git": as git names them, sha1 over a header and the bytes."""

    kind: Literal["sha256", "git"]
    hexdigest: str


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as its remote describes it."""

    name: str
    num_bytes: int
    checksum: Checksum | None = None
    etag: str = ""  # S3's name for these bytes, with its quotes


class Deadline:
    """A point in time that all steps of a fetch share; it has come when the source is closed."""

    def __init__(
        self, seconds: float, clock: Clock = time.monotonic, closing: threading.Event | None = None
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._end = clock() + seconds
        self._closing = closing

    def left(self) -> float:
        """Seconds, more than none. Raises AdapterUnavailable when the time is up."""
        if self._closing is not None and self._closing.is_set():
            raise AdapterUnavailable("the server is shutting down", retry_after_s=_RETRY_AFTER_S)
        left = self._end - self._clock()
        if left <= 0:
            raise AdapterUnavailable(
                f"fetching the adapter takes longer than {self._seconds:g} seconds; try again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        return left


def refuse_many(num_files: int, limits: FetchLimits) -> None:
    """Raises AdapterTooLarge."""
    if num_files > limits.max_files:
        raise AdapterTooLarge(f"the adapter lies among more than {limits.max_files} files")


def select_files(files: Sequence[RemoteFile], limits: FetchLimits) -> tuple[RemoteFile, ...]:
    """Those of a remote folder's files that an adapter needs, sorted by name.

    Raises AdapterInvalid for a folder that holds no adapter, AdapterTooLarge for one over the limits.
    """
    refuse_many(len(files), limits)
    names = [file.name for file in files]
    if CONFIG_FILE not in names:
        raise AdapterInvalid(f"the adapter has no {CONFIG_FILE}")
    refuse_pickle_names(names)
    chosen = tuple(sorted((file for file in files if file.name in ADAPTER_FILES), key=lambda file: file.name))
    if len({file.name for file in chosen}) != len(chosen):
        raise AdapterInvalid("the adapter has two files of one name")
    num_bytes = sum(file.num_bytes for file in chosen)
    if num_bytes > limits.max_bytes:
        raise AdapterTooLarge(
            f"the adapter's files have {num_bytes} bytes; at most {limits.max_bytes} are fetched"
        )
    return chosen
