"""How many sequences may wait. Who would make the queue longer is refused, and told when to come back.

Those that run are not in the queue; how many run at once is what the batch holds, or less where memory
turned out to be short. When there will be room is guessed from the pace at which the newest requests ended.
"""

import math
from collections import deque

from adapters.types import Clock
from server.engine.plan import StepStats
from server.engine.sequence import WaitReason
from server.errors import Overloaded

MAX_RETRY_AFTER_S = 60
_NEWEST = 32  # requests by which the pace is known


class QueueBound:
    """Belongs to the event loop."""

    def __init__(self, max_num_seqs: int, max_queued: int, clock: Clock) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_queued = max_queued
        self._clock = clock
        self._ended_at: deque[float] = deque(maxlen=_NEWEST)

    def note_end(self) -> None:
        """A request has ended."""
        self._ended_at.append(self._clock())

    def check(self, num_live: int, num_more: int, level: StepStats | None) -> None:
        """Whether more sequences may come to those that run or wait. `level`: as of the newest step.

        Raises Overloaded.
        """
        beyond = num_live + num_more - self._num_runnable(level)
        if beyond > self._max_queued:
            raise Overloaded(
                f"{num_live} sequences are running or waiting; try again later",
                retry_after_s=self._seconds_to_end(beyond),
            )

    def _num_runnable(self, level: StepStats | None) -> int:
        if level is not None and any(reason is not WaitReason.READER for reason, _ in level.waiting_by):
            return level.running
        return self._max_num_seqs

    def _seconds_to_end(self, num_requests: int) -> int:
        if len(self._ended_at) < 2:
            return 1
        period = (self._clock() - self._ended_at[0]) / len(self._ended_at)
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(num_requests * period)))
