"""Hard limits: how many requests of one adapter or of one key may be under way, and how many tokens it may
use in a minute.

Whoever is over its limit is refused at once, before anything is queued; fair shares need no such limits, they
are for what was sold. A request brings its quotas with it, so nothing here has to know of keys or names.

* Requests count from admission until the engine has let go of them, whatever ended them; one with several
  choices counts once for each. One that is larger than the limit gets in when nothing else is under way.
* Tokens fill a bucket of one minute's worth, steadily. Admission takes the tokens of the prompt out of it,
  cached or not, and each generated token is taken when it comes. A request gets in while there is anything in
  the bucket; what it takes beyond that is owed, and has to flow in again before the next one. So long prompts
  are possible, and over time the limit is exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapters.types import Clock
from server.errors import RateLimited
from server.types import GenerationRequest, Quota, QuotaKind

_MINUTE_S = 60.0
_FEW = 64  # subjects that are not worth a look for idle ones
_REMEMBERED = 0.2  # share of the newest request in the mean duration


@dataclass(slots=True, eq=False)
class _Usage:
    """Of one subject."""

    updated: float  # clock seconds
    level: float = math.inf  # of the bucket: tokens; below 0: owed
    num_requests: int = 0
    mean_s: float | None = None  # how long a request takes; None: none has ended yet

    def fill(self, quota: Quota, now: float) -> None:
        """What has flown into the bucket since the last look."""
        limit = quota.tokens_per_minute
        if limit is not None:
            self.level = min(float(limit), self.level + (now - self.updated) * limit / _MINUTE_S)
        self.updated = now

    def seconds_until_free(self) -> int:
        """When one of those under way will have ended, going by those that did."""
        return 1 if self.mean_s is None else max(1, math.ceil(self.mean_s / self.num_requests))


class Permit:
    """What an admitted request counts as, until released."""

    __slots__ = ("_clock", "_num_requests", "_since", "_usages")

    def __init__(
        self, usages: Sequence[tuple[Quota, _Usage]], num_requests: int, since: float, clock: Clock
    ) -> None:
        self._usages = tuple(usages)
        self._num_requests = num_requests
        self._since = since
        self._clock = clock

    def spend(self, num_tokens: int) -> None:
        """So many were generated."""
        now = self._clock()
        for quota, usage in self._usages:
            usage.fill(quota, now)
            usage.level -= num_tokens

    def release(self) -> None:
        """The request is over. Idempotent."""
        usages, self._usages = self._usages, ()
        took = self._clock() - self._since
        for _, usage in usages:
            usage.num_requests -= self._num_requests
            before = took if usage.mean_s is None else usage.mean_s
            usage.mean_s = before + _REMEMBERED * (took - before)


class Quotas:
    """Owned by the service."""

    def __init__(self, clock: Clock, on_refusal: Callable[[str], None]) -> None:
        """`on_refusal` is told which limit it was, in one of four words."""
        self._clock = clock
        self._on_refusal = on_refusal
        self._usages: dict[tuple[QuotaKind, str], _Usage] = {}
        self._forget_at = _FEW

    def admit(self, request: GenerationRequest) -> Permit | None:
        """Count a request, which has to be released. None: nothing limits it. Raises RateLimited."""
        if not request.quotas:
            return None
        now = self._clock()
        usages = [(quota, self._usage_of(quota, now)) for quota in request.quotas]
        for quota, usage in usages:
            usage.fill(quota, now)
            self._check(quota, usage, request.num_choices)
        for _, usage in usages:
            usage.num_requests += request.num_choices
            usage.level -= request.num_prompt_tokens
        return Permit(usages, request.num_choices, now, self._clock)

    def _check(self, quota: Quota, usage: _Usage, num_requests: int) -> None:
        most, per_minute = quota.max_requests, quota.tokens_per_minute
        if most is not None and usage.num_requests and usage.num_requests + num_requests > most:
            self._on_refusal(f"{quota.kind}_requests")
            raise RateLimited(
                f"{usage.num_requests} requests of {quota.who} are under way, and {most} may be",
                retry_after_s=usage.seconds_until_free(),
            )
        if per_minute is not None and usage.level <= 0:
            self._on_refusal(f"{quota.kind}_tokens")
            raise RateLimited(
                f"the {per_minute} tokens a minute of {quota.who} are used up",
                retry_after_s=math.floor(-usage.level * _MINUTE_S / per_minute) + 1,
            )

    def _usage_of(self, quota: Quota, now: float) -> _Usage:
        key = (quota.kind, quota.subject)
        usage = self._usages.get(key)
        if usage is None:
            if len(self._usages) >= self._forget_at:
                self._forget(now)
            usage = self._usages[key] = _Usage(now)
        return usage

    def _forget(self, now: float) -> None:
        """Those who have nothing under way and a full bucket: a minute fills it, if nothing was owed."""
        self._usages = {
            key: usage
            for key, usage in self._usages.items()
            if usage.num_requests or usage.level < 0 or now - usage.updated < _MINUTE_S
        }
        self._forget_at = 2 * len(self._usages) + _FEW
