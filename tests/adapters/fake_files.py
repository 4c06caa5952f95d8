"""Folders of adapters that exist only here: what lies in them, and a loader that can be held half-way."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.types import Revision

LIMIT_S = 30  # for a test that would hang


@dataclass(frozen=True)
class FakeWeights:
    """Stands where LoraWeights stands."""

    revision: Revision
    num_bytes: int
    rank: int = 8
    target_names: tuple[str, ...] = ("q_proj", "v_proj")


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
    """Contents by folder. `load` is what an AdapterStore takes."""

    def __init__(self) -> None:
        self.reads: list[Path] = []
        self._contents: dict[Path, FakeWeights | Exception] = {}
        self._gates: dict[Path, Gate] = {}

    def put(self, folder: str, revision: str, num_bytes: int = 10) -> Path:
        self._contents[Path(folder)] = FakeWeights(Revision(revision), num_bytes)
        return Path(folder)

    def spoil(self, folder: str, error: Exception) -> Path:
        self._contents[Path(folder)] = error
        return Path(folder)

    @contextmanager
    def held(self, folder: str, limit: int | None = None) -> Iterator[Gate]:
        """Loads that begin inside the block wait for its end, or until the gate is opened."""
        gate = self._gates[Path(folder)] = Gate(limit)
        try:
            yield gate
        finally:
            del self._gates[Path(folder)]
            gate.is_open.set()

    def load(self, folder: Path) -> FakeWeights:
        self.reads.append(folder)
        content = self._contents[folder]  # as of the begin, like a file that was opened
        if (gate := self._gates.get(folder)) is not None:
            gate.pass_through()
        if isinstance(content, Exception):
            raise content
        return content


class FakeClock:
    """Time that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
