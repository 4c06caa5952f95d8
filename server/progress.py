"""What an operator sees while the server starts: one line per stage, the running one redrawn."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

_BAR = 24


class StartProgress:
    """Called from the loading thread alone."""

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out or sys.stderr
        self._clock = clock
        self._stage = ""
        self._began = clock()
        self.text = "importing libraries"

    def __call__(self, stage: str, fraction: float) -> None:
        """`stage` is `fraction` done, 0 to 1."""
        if stage != self._stage:
            self._stage, self._began = stage, self._clock()
        self.text = f"{stage}: {fraction:.0%}"
        if fraction >= 1:
            self._write(f"  {stage:<12} {self._clock() - self._began:5.1f} s\n")
        elif self._out.isatty():
            done = round(fraction * _BAR)
            self._write(f"  {stage:<12} {'#' * done}{'.' * (_BAR - done)} {fraction:4.0%}")

    def note(self, stage: str, result: str) -> None:
        """A stage that is done, and what came of it."""
        self.text = f"{stage}: {result}"
        self._write(f"  {stage:<12} {result}\n")

    def _write(self, line: str) -> None:
        start = "\r\x1b[K" if self._out.isatty() else ""  # over what stood there
        self._out.write(f"{start}{line}")
        self._out.flush()


def in_units(num_bytes: int) -> str:
    """512 MiB, 1.5 GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def in_millions(num_parameters: int) -> str:
    """3.4 M, 494 M, 7.6 B."""
    if num_parameters >= 1e9:
        return f"{num_parameters / 1e9:.1f} B"
    return f"{num_parameters / 1e6:.3g} M"
