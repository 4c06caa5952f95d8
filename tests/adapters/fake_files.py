"""Folders of adapters that exist only here: what lies in them, and a loader that can be held half-way."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.reader import AdapterFiles
from adapters.signature import Signature
from adapters.types import Outline, Revision

LIMIT_S = 30  # for a test that would hang


@dataclass(frozen=True)
class FakeWeights:
    """Stands where LoraWeights stands."""

    revision: Revision
    num_bytes: int
    rank: int = 8
    target_names: tuple[str, ...] = ("q_proj", "v_proj")
    kinds: tuple[str, ...] = ()
    invocation_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Content:
    """What lies in a folder."""

    weights: FakeWeights | None
    outline_error: Exception | None = None
    error: Exception | None = None  # found when the numbers are read
    extras: object | None = None
    version: int = 0


class Gate:
    """Holds those who come by until it is opened; at most `limit` of them, if there is one."""

    def __init__(self, limit: int | None = None) -> None:
        self.num_left = limit
        self.is_reached = threading.Event()
        self.is_open = threading.Event()

    def pass_through(self) -> None:
        if self.num_left == 0:
            return
        if self.num_left is not None:
            self.num_left -= 1
        self.is_reached.set()
        assert self.is_open.wait(LIMIT_S), "the gate was never opened"


class FakeFiles:
    """Contents by folder. `files` is what an AdapterRegistry takes."""

    def __init__(self) -> None:
        self.reads: list[Path] = []
        self.outlines: list[Path] = []
        self.files: AdapterFiles[FakeWeights] = AdapterFiles(
            self.outline, self.load, self.read_extras, self.sign
        )
        self._contents: dict[Path, Content] = {}
        self._gates: dict[Path, Gate] = {}
        self._num_writes = 0

    def put(self, folder: str, revision: str, num_bytes: int = 10, *, extras: object | None = None) -> Path:
        weights = FakeWeights(Revision(revision), num_bytes)
        return self._write(folder, Content(weights, extras=extras))

    def spoil(self, folder: str, error: Exception) -> Path:
        """Something is wrong that only shows when the numbers are read."""
        return self._write(folder, Content(FakeWeights(Revision("spoilt"), 10), error=error))

    def cut_off(self, folder: str, error: Exception) -> Path:
        """Something is wrong that config or header show."""
        return self._write(folder, Content(None, outline_error=error))

    @contextmanager
    def held(self, folder: str, limit: int | None = None) -> Iterator[Gate]:
        """Loads that begin inside the block wait for its end, or until the gate is opened."""
        gate = self._gates[Path(folder)] = Gate(limit)
        try:
            yield gate
        finally:
            del self._gates[Path(folder)]
            gate.is_open.set()

    def outline(self, folder: Path) -> Outline:
        self.outlines.append(folder)
        content = self._contents[folder]
        if content.outline_error is not None:
            raise content.outline_error
        assert content.weights is not None
        return Outline(content.weights.rank, content.weights.target_names, content.weights.num_bytes)

    def load(self, folder: Path) -> FakeWeights:
        self.reads.append(folder)
        content = self._contents[folder]  # as of the begin, like a file that was opened
        if (gate := self._gates.get(folder)) is not None:
            gate.pass_through()
        if (error := content.error or content.outline_error) is not None:
            raise error
        assert content.weights is not None
        return content.weights

    def read_extras(self, folder: Path) -> object | None:
        return self._contents[folder].extras

    def sign(self, folder: Path) -> Signature:
        content = self._contents.get(folder)
        return Signature(str(folder), () if content is None else (content.version,))

    def _write(self, folder: str, content: Content) -> Path:
        self._num_writes += 1
        self._contents[Path(folder)] = Content(
            content.weights, content.outline_error, content.error, content.extras, self._num_writes
        )
        return Path(folder)


class FakeClock:
    """Time that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
