"""Finding stop strings in a text that arrives in pieces.

The match that ends first wins, and of those that end at the same character the longest. So the result does
not depend on where the pieces are cut. Until a match, only the longest end of the text that could still
become a stop string is held back; with `keep_stop` nothing is, because the stop string belongs to the
answer anyway.

Each stop string is followed by the Knuth-Morris-Pratt automaton: its state is the length of the longest
prefix of the stop string that the text now ends with. One pass finds the match and the length to hold back,
in time linear in the text whatever the stop strings are.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A stop string and, for each length of a matched prefix, the next shorter prefix that also matches."""

    text: str
    shorter: tuple[int, ...]  # shorter[k]: longest proper border of text[:k]

    def advance(self, matched: int, character: str) -> int:
        """The state after one more character; len(text) = the stop string ends here."""
        if matched == len(self.text):
            matched = self.shorter[matched]
        while matched and self.text[matched] != character:
            matched = self.shorter[matched]
        return matched + 1 if self.text[matched] == character else 0


def _pattern(text: str) -> _Pattern:
    shorter = [0, 0]
    for end in range(1, len(text)):
        border = shorter[end]
        while border and text[border] != text[end]:
            border = shorter[border]
        shorter.append(border + 1 if text[border] == text[end] else 0)
    return _Pattern(text, tuple(shorter))


class StopStrings:
    """The matcher of one choice. `again()` gives another one for the next choice without a new set-up."""

    __slots__ = ("_first_characters", "_held", "_keep_stop", "_patterns", "_states")

    def __init__(self, stop: Iterable[str], keep_stop: bool) -> None:
        """`stop` holds no empty string. With `keep_stop` the text includes the stop string."""
        self._patterns = tuple(_pattern(text) for text in dict.fromkeys(stop))
        assert all(pattern.text for pattern in self._patterns), "an empty stop string matches everywhere"
        self._first_characters = frozenset(pattern.text[0] for pattern in self._patterns)
        self._keep_stop = keep_stop
        self._states = [0] * len(self._patterns)
        self._held = ""

    def again(self) -> "StopStrings":
        """A matcher for the same stop strings that has seen nothing yet."""
        other = object.__new__(StopStrings)
        other._patterns = self._patterns
        other._first_characters = self._first_characters
        other._keep_stop = self._keep_stop
        other._states = [0] * len(self._patterns)
        other._held = ""
        return other

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Take the next piece; give the text that is now certain, and the stop string if one has ended.

        With `may_stop` False (before min_tokens) a stop string that ends in this piece counts as ordinary
        text. After a match the rest of the piece is dropped and nothing may be pushed.
        """
        if not any(self._states) and self._first_characters.isdisjoint(text):
            return text, None
        for end, character in enumerate(text, start=1):
            matched = self._advance(character)
            if matched and may_stop:
                return self._cut(text[:end], matched), matched
        if self._keep_stop:
            return text, None
        return self._hold_back(text), None

    def flush(self) -> str:
        """The text still held back, when the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Move every pattern by one character; the longest stop string that ends with it."""
        longest: str | None = None
        for i, pattern in enumerate(self._patterns):
            self._states[i] = state = pattern.advance(self._states[i], character)
            if state == len(pattern.text) and (longest is None or state > len(longest)):
                longest = pattern.text
        return longest

    def _cut(self, text: str, matched: str) -> str:
        pending = self._held + text
        self._held = ""
        return pending if self._keep_stop else pending[: len(pending) - len(matched)]

    def _hold_back(self, text: str) -> str:
        pending = self._held + text
        # A stop string that has ended but may not stop is text; what of it can begin another one is its
        # border.
        num_held = max(
            pattern.shorter[state] if state == len(pattern.text) else state
            for pattern, state in zip(self._patterns, self._states, strict=True)
        )
        cut = len(pending) - num_held
        self._held = pending[cut:]
        return pending[:cut]
