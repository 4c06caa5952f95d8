"""Does a pattern out of a stranger's config match a module path? Answered in bounded time.

PEFT lets a config hold regular expressions, and adapters come from strangers. Python's `re` backtracks: a few dozen
characters are enough to keep it busy for hours, holding the interpreter lock, and with it every stream of the server.
So a pattern without any quantifier goes to `re`, and every other one is matched here: the parsed expression is followed
with the *set* of positions it can have reached, which never goes back, and each step is paid from a budget that all
patterns of one adapter share. What only backtracking can do (back references, look-behind, atomic groups, inline flags)
is refused; target patterns in the wild do not use it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from adapters.errors import AdapterInvalid
from adapters.names import shown

MAX_PATTERN_CHARS = 8192
_MAX_STEPS = 3_000_000  # about two seconds of a pool thread that gives the interpreter lock away as usual

_PLAIN = re.compile(r"(?:[A-Za-z0-9_.\-]|\\[.d])*")
"""Patterns that `re` matches without a choice to come back to."""

_Node = tuple[Any, Any]


@dataclass(slots=True)
class MatchBudget:
    """Steps that the patterns of one adapter may still take together."""

    steps_left: int = _MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise AdapterInvalid("the patterns in adapter_config.json take too long to match")


def is_plain(pattern: str) -> bool:
    """Whether the pattern is only names, dots and digits."""
    return _PLAIN.fullmatch(pattern) is not None


class ModulePattern:
    """A regular expression over whole module paths."""

    def __init__(self, pattern: str, budget: MatchBudget, *, is_suffix: bool = False) -> None:
        """`is_suffix`: the pattern may be preceded by whole parts of the path, as in PEFT's rank_pattern.

        Raises AdapterInvalid for what is not an expression or is not served.
        """
        if len(pattern) > MAX_PATTERN_CHARS:
            raise AdapterInvalid(
                f"a pattern in adapter_config.json is longer than {MAX_PATTERN_CHARS} characters"
            )
        self.text = pattern
        self._budget = budget
        self._compiled: re.Pattern[str] | None = None
        self._nodes: Sequence[_Node] = ()
        whole = rf"(.*\.)?({pattern})" if is_suffix else pattern
        try:
            if is_plain(pattern):
                self._compiled = re.compile(whole)
            else:
                self._nodes = _parse(whole)
        except (re.error, RecursionError, OverflowError, ValueError, MemoryError) as error:
            raise AdapterInvalid(f"{shown(pattern)} in adapter_config.json is not a pattern") from error

    def matches(self, path: str) -> bool:
        """Whether it matches all of the path. Raises AdapterInvalid when the budget is spent."""
        self._budget.spend(len(path))
        if self._compiled is not None:
            return self._compiled.fullmatch(path) is not None
        try:
            return len(path) in _Matcher(path, self._budget).ends(self._nodes, {0})
        except RecursionError as error:
            raise AdapterInvalid(f"{shown(self.text)} in adapter_config.json is nested too deeply") from error


def _parse(pattern: str) -> Sequence[_Node]:
    parsed = _parser.parse(pattern)
    if parsed.state.flags & ~re.UNICODE.value:
        raise AdapterInvalid(f"{shown(pattern)} in adapter_config.json sets flags, which is not served")
    _check(parsed, pattern)
    nodes: Sequence[_Node] = parsed
    return nodes


def _check(nodes: Iterable[_Node], pattern: str) -> None:
    """Raises AdapterInvalid if any part of the expression needs backtracking."""
    for kind, argument in nodes:
        inner: list[Iterable[_Node]] = []
        if kind is op.BRANCH:
            inner = argument[1]
        elif kind is op.SUBPATTERN and not argument[1] and not argument[2]:
            inner = [argument[3]]
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            inner = [argument[2]]
        elif kind in (op.ASSERT, op.ASSERT_NOT) and argument[0] == 1:
            inner = [argument[1]]
        elif kind not in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.AT):
            raise AdapterInvalid(
                f"{shown(pattern)} in adapter_config.json uses {str(kind).lower()}, which is not served"
            )
        for part in inner:
            _check(part, pattern)


class _Matcher:
    """Follows an expression over one text."""

    def __init__(self, text: str, budget: MatchBudget) -> None:
        self._text = text
        self._budget = budget

    def ends(self, nodes: Iterable[_Node], starts: set[int]) -> set[int]:
        """Where a match of the nodes, one after the other, can end if it begins in `starts`."""
        positions = starts
        for kind, argument in nodes:
            self._budget.spend(1 + len(positions))
            positions = self._after(kind, argument, positions)
            if not positions:
                break
        return positions

    def _after(self, kind: Any, argument: Any, positions: set[int]) -> set[int]:
        if kind is op.BRANCH:
            return set().union(*(self.ends(branch, positions) for branch in argument[1]))
        if kind is op.SUBPATTERN:
            return self.ends(argument[3], positions)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeated(*argument, positions)
        if kind in (op.ASSERT, op.ASSERT_NOT):
            wanted = kind is op.ASSERT
            return {p for p in positions if bool(self.ends(argument[1], {p})) is wanted}
        if kind is op.AT:
            return {p for p in positions if self._is_at(argument, p)}
        text = self._text
        return {p + 1 for p in positions if p < len(text) and _accepts(kind, argument, text[p])}

    def _repeated(self, least: int, most: int, nodes: Iterable[_Node], positions: set[int]) -> set[int]:
        """Positions never go back, so the set of them settles after at most one round per character."""
        for _ in range(min(least, len(self._text) + 1)):
            following = self.ends(nodes, positions)
            if following == positions:
                break
            positions = following
        reached, latest = set(positions), positions
        for _ in range(min(max(most - least, 0), len(self._text) + 1)):
            latest = self.ends(nodes, latest) - reached
            if not latest:
                break
            reached |= latest
        return reached

    def _is_at(self, place: Any, position: int) -> bool:
        text = self._text
        if place in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return position == 0
        if place is op.AT_END_STRING:
            return position == len(text)
        if place is op.AT_END:
            return position == len(text) or (position == len(text) - 1 and text[position] == "\n")
        before = position > 0 and _is_word(text[position - 1])
        after = position < len(text) and _is_word(text[position])
        return (before != after) is (place is op.AT_BOUNDARY)


def _accepts(kind: Any, argument: Any, char: str) -> bool:
    if kind is op.LITERAL:
        return ord(char) == argument
    if kind is op.NOT_LITERAL:
        return ord(char) != argument
    if kind is op.ANY:
        return char != "\n"
    negated = argument[0][0] is op.NEGATE
    return any(_in_item(item, value, char) for item, value in argument[negated:]) is not negated


def _in_item(kind: Any, value: Any, char: str) -> bool:
    if kind is op.LITERAL:
        return ord(char) == value
    if kind is op.RANGE:
        return bool(value[0] <= ord(char) <= value[1])
    classes = {
        op.CATEGORY_DIGIT: str.isdecimal,
        op.CATEGORY_SPACE: str.isspace,
        op.CATEGORY_WORD: _is_word,
    }
    if value in classes:
        return classes[value](char)
    opposite = {
        op.CATEGORY_NOT_DIGIT: str.isdecimal,
        op.CATEGORY_NOT_SPACE: str.isspace,
        op.CATEGORY_NOT_WORD: _is_word,
    }
    return not opposite[value](char)


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
