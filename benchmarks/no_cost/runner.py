"""A device that costs nothing: every sequence gets its next token at once, or after a fixed time a step.

With it in place of the model, whatever time a stream takes is the serving stack's own. The pause of a paced
runner is a sleep, which lets other threads run, as a forward pass does in torch.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep

from server.engine.plan import RunnerOutput, SampledToken, StepPlan
from server.engine.sequence import Sequence as EngineSequence

FULL_SHARE = 0.8  # while streams come and go, a batch is seldom quite full


@dataclass(frozen=True, slots=True)
class StepMark:
    at: float  # perf_counter seconds of its begin
    num_rows: int
    ended: float  # perf_counter seconds: all of its tokens were made
    sampled: tuple[EngineSequence, ...]  # those that got a token


class NoCostRunner:
    """Implements `Runner`. The i-th token of a sequence is the i-th of `token_ids`, over and over."""

    def __init__(self, token_ids: Sequence[int], step_s: float) -> None:
        self.token_ids = tuple(token_ids)
        self._step_s = step_s
        self.marks: list[StepMark] = []

    def run(self, plan: StepPlan) -> RunnerOutput:
        began = perf_counter()
        if self._step_s:
            sleep(self._step_s)
        ids, count = self.token_ids, len(self.token_ids)
        sampled = tuple([chunk.sequence for chunk in plan.chunks if chunk.samples])
        answer = RunnerOutput(
            tuple([SampledToken(sequence.id, ids[sequence.num_generated % count]) for sequence in sampled])
        )
        self.marks.append(StepMark(began, len(plan.chunks), perf_counter(), sampled))
        return answer

    def full_gaps(self, rows: int) -> list[tuple[int, float]]:
        """(rows, seconds to the next step) of each step whose batch was about full."""
        enough = FULL_SHARE * rows
        return [
            (mark.num_rows, following.at - mark.at)
            for mark, following in itertools.pairwise(self.marks)
            if min(mark.num_rows, following.num_rows) >= enough
        ]

    def period_s(self, rows: int) -> float:
        """Median time from one full step to the next, in seconds; NaN if there was none."""
        gaps = [gap for _, gap in self.full_gaps(rows)]
        return median(gaps) if gaps else math.nan

    def tokens_per_s(self, rows: int) -> float:
        """Rows over time while the batch was about full."""
        gaps = self.full_gaps(rows)
        return sum(count for count, _ in gaps) / sum(gap for _, gap in gaps) if gaps else math.nan
