"""How long a step may be while several tenants are there, where its time grows with its tokens.

Whoever comes while a step is computed waits for its end, and then for a step of its own. If a *crowd*,
several sequences of one tenant, gets no longer a step than a *guest's* prompt takes by itself, the guest
waits about as long as it computes: half of the machine is what it feels. Both are measured as steps go by,
and a part is left for what else a crowd takes, such as writing to all its clients:

    bound = 0.8 * seconds of a guest's step / seconds of a crowd's token

So short prompts make short steps, and long ones let a crowd have its large batches.
"""

from collections import deque

from adapters.types import Clock

_LASTS_S = 5.0  # after several tenants were there, one that is alone expects the others back
_FEWEST_TOKENS = 16  # with fewer a step hardly gets shorter, but its tokens dearer
_SHARE = 0.8  # of a guest's time
_NEWS = 0.2  # share of the newest step in what is known of a crowd's
_GUESTS = 5  # newest steps of guests; the shortest counts, as the others shared the processor
_ENOUGH = 3  # of them; the first may come with the crowd's two hundred requests, and take ten times as long


class Company:
    """Belongs to the scheduler."""

    def __init__(self, first_tokens: int | None, clock: Clock) -> None:
        """`first_tokens`: the bound before anything was measured; None: there is none, ever."""
        self._first_tokens = first_tokens
        self._clock = clock
        self._until = float("-inf")
        self._guest_s: deque[float] = deque(maxlen=_GUESTS)  # of a step
        self._crowd_s: float | None = None  # of a token

    def max_crowd_tokens(self, num_tenants: int) -> int | None:
        """Of a step that begins now, while so many tenants have sequences; None: no bound."""
        if self._first_tokens is None:
            return None
        now = self._clock()
        if num_tenants > 1:
            self._until = now + _LASTS_S
        if now >= self._until:
            return None
        if len(self._guest_s) < _ENOUGH or self._crowd_s is None:
            return self._first_tokens
        return max(_FEWEST_TOKENS, round(_SHARE * min(self._guest_s) / self._crowd_s))

    def observe(self, seconds: float, num_tokens: int, *, is_guests: bool) -> None:
        """A step of so many tokens took so long. `is_guests`: a prompt had it to itself."""
        if seconds <= 0.0 or self._first_tokens is None:
            return
        if is_guests:
            self._guest_s.append(seconds)
        elif num_tokens >= _FEWEST_TOKENS:
            new, known = seconds / num_tokens, self._crowd_s
            self._crowd_s = new if known is None else known + _NEWS * (new - known)
