"""Does a pattern out of a stranger's config match a module path? Answered in bounded time.

PEFT lets a config hold regular expressions, and adapters come from strangers. Python's `re` backtracks: a
few dozen characters keep it busy for hours, holding the interpreter lock and with it every stream of the
server. Patterns of names, dots and digits have nothing to come back to and go to `re`; all others go to
`regex`, which takes a time limit and lets other threads run. Compiling is no cheaper than matching where
there are thousands of patterns, so both are paid out of one budget that the patterns of an adapter share.
"""

import re
import time
from dataclasses import dataclass

import regex  # type: ignore[import-untyped]

from adapters.errors import AdapterInvalid
from adapters.names import shown

MAX_PATTERN_CHARS = 8192
_MAX_S = 1.0  # of a loader's processor time; real adapters need milliseconds
_PLAIN_MATCH_S = 1e-6  # cheaper than a look at the clock
_PLAIN = re.compile(r"(?:[A-Za-z0-9_.\-]|\\[.d])*")


@dataclass(slots=True)
class MatchBudget:
    """Processor time that the patterns of one adapter may still take together."""

    left_s: float = _MAX_S

    def spend(self, seconds: float, pattern: str) -> None:
        """Raises AdapterInvalid when nothing is left."""
        self.left_s -= seconds
        if self.left_s <= 0:
            raise AdapterInvalid(f"the patterns in the config take too long; the last was {shown(pattern)}")


def is_plain(pattern: str) -> bool:
    """Whether the pattern is only names, dots and digits."""
    return _PLAIN.fullmatch(pattern) is not None


class ModulePattern:
    """A regular expression over whole module paths."""

    def __init__(self, pattern: str, budget: MatchBudget, *, is_suffix: bool = False) -> None:
        """`is_suffix`: whole parts of the path may come before it, as in PEFT's rank_pattern.

        Raises AdapterInvalid for what is no expression.
        """
        if len(pattern) > MAX_PATTERN_CHARS:
            raise AdapterInvalid(f"a pattern in the config is longer than {MAX_PATTERN_CHARS} characters")
        self.text = pattern
        self._budget = budget
        self._plain: re.Pattern[str] | None = None
        whole = rf"(.*\.)?({pattern})" if is_suffix else pattern
        begun = time.thread_time()
        try:
            plain = re.compile(whole)  # also for the others: PEFT reads them with `re`
            if is_plain(pattern):
                self._plain = plain
            else:
                self._guarded = regex.compile(whole, cache_pattern=False)
        except (re.error, regex.error, RecursionError, OverflowError, ValueError, Warning) as error:
            raise AdapterInvalid(f"{shown(pattern)} in the config is not a pattern") from error
        budget.spend(time.thread_time() - begun, pattern)

    def matches(self, path: str) -> bool:
        """Whether it matches all of the path. Raises AdapterInvalid when the time is spent."""
        if self._plain is not None:
            self._budget.spend(_PLAIN_MATCH_S, self.text)
            return self._plain.fullmatch(path) is not None
        begun = time.thread_time()
        try:
            limit_s = max(self._budget.left_s, 1e-6)
            return self._guarded.fullmatch(path, timeout=limit_s, concurrent=True) is not None
        except (TimeoutError, MemoryError, RecursionError) as error:
            raise AdapterInvalid(f"{shown(self.text)} in the config takes too long to match") from error
        finally:
            self._budget.spend(time.thread_time() - begun, self.text)
