"""What was wrong with files, remembered for a while: who asks again at once is answered from memory.

A failure is believed for some seconds, and for twice as long each time it comes again, up to a limit; and
only as long as the files are the same, which their signature tells. So neither does an impatient client make
a server read broken files all the time, nor does a repaired adapter wait. What is only not there now is tried
again every few seconds. The table is bounded: the failure that was seen longest ago is forgotten first.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

from adapters.errors import AdapterError, AdapterUnavailable
from adapters.types import Clock

_FIRST_S = 5.0
_LONGEST_S = 120.0
_MAX_REMEMBERED = 1024
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Failure:
    """One key's."""

    error: AdapterError
    signature: Hashable
    patience_s: float
    until: float  # the clock's seconds


class Failures:
    """Belongs to the event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: OrderedDict[Hashable, _Failure] = OrderedDict()

    def repeat(self, key: Hashable, signature: Hashable) -> None:
        """Raise what went wrong a moment ago, unless the signature says that this may be different now."""
        failure = self._known.get(key)
        if failure is None:
            return
        if failure.signature != signature:
            del self._known[key]
        elif self._clock() < failure.until:
            raise failure.error.with_traceback(None)  # else it would grow with every raise

    async def attempt(self, key: Hashable, signature: Hashable, work: Callable[[], Awaitable[T]]) -> T:
        """The outcome of the work, or of the last attempt at it if that failed a moment ago."""
        self.repeat(key, signature)
        try:
            outcome = await work()
        except AdapterError as error:
            self.remember(key, signature, error)
            raise
        self.forget(key)
        return outcome

    def remember(self, key: Hashable, signature: Hashable, error: AdapterError) -> None:
        """The error is kept, but not the frames that raised it: they hold what was read."""
        error.__cause__ = error.__context__ = error.__traceback__ = None
        before = self._known.pop(key, None)
        patience = _FIRST_S
        if before is not None and before.signature == signature and not isinstance(error, AdapterUnavailable):
            patience = min(_LONGEST_S, 2 * before.patience_s)
        self._known[key] = _Failure(error, signature, patience, self._clock() + patience)
        if len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        """It went well."""
        self._known.pop(key, None)
