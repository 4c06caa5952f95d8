"""Turns at being taken in: a burst of requests does not keep the machine from everybody else's.

Tokenising a request and handing it over takes the event loop some tenths of a millisecond, and the loop runs
whatever is ready before it looks again. Of two hundred requests that come at once a few have their turn, the
tenants one after the other, and then the loop pauses: for tokens that are to be sent, for the next tenant's
request, and, where cores are few, for the step that is being computed. Who comes while nobody waits does not
wait either.
"""

import asyncio
from collections import deque

PER_ROUND = 4  # requests: about a millisecond
PAUSE_S = 0.002


class Intake:
    """The lines of those who wait for a turn, one a tenant. For one event loop."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of their next turns
        self._left = PER_ROUND  # turns of this round
        self._is_in_round = False  # whether the next one is scheduled

    async def turn(self, tenant: str) -> None:
        """Return when it is this tenant's turn. May be cancelled."""
        loop = asyncio.get_running_loop()
        if not self._is_in_round:
            self._is_in_round = True
            loop.call_later(PAUSE_S, self._begin_round)
        if self._left and not self._lines:
            self._left -= 1
            return
        turn = loop.create_future()
        self._lines.setdefault(tenant, deque()).append(turn)
        await turn

    def _begin_round(self) -> None:
        self._left = PER_ROUND
        while self._left and self._lines:
            tenant = next(iter(self._lines))
            line = self._lines.pop(tenant)
            turn = line.popleft()
            if line:
                self._lines[tenant] = line  # behind the others
            if not turn.done():  # else whoever waited has gone
                turn.set_result(None)
                self._left -= 1
        self._is_in_round = self._left < PER_ROUND
        if self._is_in_round:
            asyncio.get_running_loop().call_later(PAUSE_S, self._begin_round)
