"""Where the time of a step goes, part by part.

The engine's thread does one thing after the other, so a clock that is read at the seams tells all of it. On a
GPU that is the time in which work is handed over, and what waits for the device is the part that asks for its
answer first.
"""

import time
from collections.abc import Iterable

from server.engine.plan import Part, SecondsByPart


class Stopwatch:
    """One step at a time, on one thread."""

    def __init__(self) -> None:
        self._seconds: dict[Part, float] = {}
        self._at = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._seconds = {}
        self._at = time.perf_counter()

    def lap(self, part: Part) -> None:
        """What has passed since the last lap, or the beginning, went into this part."""
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._at
        self._at = now

    def split(self, whole: Part, parts: Iterable[tuple[Part, float]]) -> None:
        """So many seconds of the whole were those of parts."""
        for part, seconds in parts:
            self._seconds[whole] -= seconds
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def read(self) -> SecondsByPart:
        """Since `begin`."""
        return tuple(self._seconds.items())
