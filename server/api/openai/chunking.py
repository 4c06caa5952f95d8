"""Larger deltas for clients that ask for them: text is held back until a word, a sentence or a count of
tokens is full.

Nothing is lost or changed: what comes out, joined, is what went in.
"""

import re
from collections.abc import Mapping
from typing import Literal

ChunkBy = Literal["token", "word", "sentence"]

_UNIT_END: Mapping[str, re.Pattern[str]] = {
    # Chinese and Japanese have no white space: each character is a word, and so is each of their marks.
    "word": re.compile(
        r"\S(?=\s)|[\u3001-\u301f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
        r"|[\uff01-\uff0f\uff1a-\uff1f\U00020000-\U0003ffff]"
    ),
    # Western marks end a sentence only before white space (3.14, e.g.); East Asian ones and line ends always
    # do.
    "sentence": re.compile(r"[.!?…]['\")\]”]*(?=\s)|[。\uff01\uff1f]['\")\]」』]*|\n"),
}
_MOST_HELD_CHARS = 4096  # a text without an end is not held for ever, nor searched again and again


class Chunker:
    """Collects one choice's text into pieces of `size` units."""

    def __init__(self, by: ChunkBy, size: int) -> None:
        self._ends = _UNIT_END.get(by)
        self._size = size
        self._held = ""
        self._num_tokens = 0

    def take(self, text: str) -> str:
        """Add the text of one token; returns what is full, or ""."""
        self._held += text
        self._num_tokens += 1
        cut = self._cut()
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def flush(self) -> str:
        """The rest."""
        ready, self._held = self._held, ""
        return ready

    def _cut(self) -> int:
        if len(self._held) > _MOST_HELD_CHARS:
            return len(self._held)
        if self._ends is None:
            if self._num_tokens < self._size:
                return 0
            self._num_tokens = 0
            return len(self._held)
        ends = [match.end() for match in self._ends.finditer(self._held)]
        num_full = len(ends) // self._size * self._size
        return ends[num_full - 1] if num_full else 0
