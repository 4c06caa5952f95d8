"""The engine without its thread: takes commands, does steps, tells what came out.

A step is schedule, run, commit, report. It is synchronous and deterministic: time comes from an injected
clock, arithmetic from an injected `Runner`, and whoever owns the core calls `step()` as long as it
`has_work`.

What this module guarantees, whatever happens: every `Add` is answered by exactly one SequenceOutput with a
`finish`. There are six ways to get it:

    token      a stop token, the last allowed token, a full context
    prompt     it is computed to its end, and nothing else was asked for
    End        the service wants no more: answered at once, also when the sequence has not run yet
    refusal    it can never run (on): too large for the KV or adapter memory, or malformed
    bad row    what the runner computed for it is not finite
    bad step   the runner raised: the sequences of the step end, nothing of it counts, the engine goes on
"""

import logging
from typing import NamedTuple

from adapters.types import Clock
from server.engine.plan import (
    Add,
    Command,
    End,
    Forget,
    Part,
    Pause,
    Pins,
    Resume,
    Runner,
    RunnerOutput,
    SampledToken,
    ScoredToken,
    SecondsByPart,
    SequenceOutput,
    StepOutput,
    StepPlan,
)
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.types import FinishReason

logger = logging.getLogger(__name__)

BAD_STEP = "the engine failed while it worked on this request"
BAD_ROW = "the model's output for this request was not a number"


class Ending(NamedTuple):
    """Why a sequence is over; the fields are those of SequenceOutput."""

    reason: FinishReason
    stop_token: int | None = None
    error: str | None = None


_GOES_ON = None, None, None


class BrokenAnswer(Exception):
    """The runner did not answer for exactly the sequences that it was asked about."""


class EngineCore:
    """Owned by the engine thread; every method is called there."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._outputs: list[SequenceOutput] = []  # to be told with the next StepOutput
        self._has_new_levels = False  # a pause or resume changed what the stats say

    @property
    def has_work(self) -> bool:
        """Whether `step` would return something."""
        return self._scheduler.has_runnable or bool(self._outputs) or self._has_new_levels

    def handle(self, command: Command) -> None:
        """Take a command in. Ids that do not live (any more) are ignored: ends race with natural ends."""
        if isinstance(command, Add):
            self._add(command)
            return
        if isinstance(command, Pins):
            self._scheduler.pin(command.refs)
            return
        if isinstance(command, Forget):
            self._scheduler.forget(command.revision)
            return
        sequence = self._scheduler.get(command.id)
        if sequence is None:
            return
        match command:
            case End(reason=reason):
                self._tell(sequence, None, Ending(reason))
            case Pause():
                self._scheduler.pause(sequence)
                self._has_new_levels = True
            case Resume():
                self._scheduler.resume(sequence)
                self._has_new_levels = True

    def step(self) -> StepOutput | None:
        """Do one step. None: nothing to do and nothing to tell."""
        began = self._clock()
        plan = self._scheduler.schedule()  # bookkeeping only
        self._report_refusals()
        seconds: SecondsByPart = ()
        if plan is not None:
            answer = self._run(plan)  # the only device work
            if answer is None:
                self._fail(plan)
            else:
                self._scheduler.observe(plan, self._clock() - began)
                self._scheduler.commit(plan, answer)  # appends tokens, publishes full blocks
                self._report(plan, answer)  # ends what is over, frees it
                seconds = answer.seconds
        return self._take_output(plan, began, seconds)

    def _add(self, command: Add) -> None:
        sequence = Sequence(
            id=command.id,
            tokens=list(command.prompt_ids),
            num_prompt=len(command.prompt_ids),
            sampling=command.sampling,
            stop=command.stop,
            seed=command.seed,
            adapter=command.adapter,
            arrival=self._clock(),
            pooling=command.pooling,
            tenant=command.tenant,
            weight=command.weight,
            adapter_start=command.adapter_start,
        )
        ending = self._ending_at_birth(sequence)
        if ending is None:
            self._scheduler.add(sequence)
        else:
            self._tell(sequence, None, ending)

    def _ending_at_birth(self, sequence: Sequence) -> Ending | None:
        """The service checks these with better messages; here they keep the loop from running astray."""
        if sequence.num_prompt == 0:
            return Ending(FinishReason.ERROR, error="the prompt is empty")
        if sequence.num_prompt + (not sequence.is_prompt_only) > self._max_model_len:
            return Ending(FinishReason.ERROR, error="the prompt leaves no room in the model's context")
        if sequence.is_prompt_only and not sequence.is_unscored and sequence.pooling is None:
            return Ending(FinishReason.LENGTH)
        return None

    def _run(self, plan: StepPlan) -> RunnerOutput | None:
        """None: the runner failed. That costs this step's sequences their lives, and nobody else anything."""
        try:
            answer = self._runner.run(plan)
            _check_answer(plan, answer)
        except Exception:
            logger.exception("step failed: %d sequences, %d tokens", len(plan.chunks), plan.num_tokens)
            return None
        return answer

    def _fail(self, plan: StepPlan) -> None:
        self._scheduler.fail()
        for chunk in plan.chunks:
            self._tell(chunk.sequence, None, Ending(FinishReason.ERROR, error=BAD_STEP))

    def _report(self, plan: StepPlan, answer: RunnerOutput) -> None:
        sequences = {chunk.sequence.id: chunk.sequence for chunk in plan.chunks}
        scores = {found.id: found.tokens for found in answer.scores}
        for token in answer.tokens:
            sequence = sequences[token.id]
            ending = ending_after(sequence, self._eos_token_ids, self._max_model_len)
            self._tell(sequence, token, ending, scores=scores.pop(token.id, ()))
        for sequence_id in answer.failed:
            self._tell(sequences[sequence_id], None, Ending(FinishReason.ERROR, error=BAD_ROW))
        vectors = {found.id: found.values for found in answer.vectors}
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if chunk.ends_prompt_only and sequence.id not in answer.failed:
                vector, told = vectors.get(sequence.id), scores.pop(sequence.id, ())
                self._tell(sequence, None, Ending(FinishReason.LENGTH), scores=told, vector=vector)
        for sequence_id, told in scores.items():
            self._tell(sequences[sequence_id], None, None, scores=told)

    def _report_refusals(self) -> None:
        for refusal in self._scheduler.take_refusals():
            self._tell(refusal.sequence, None, Ending(FinishReason.ERROR, error=refusal.message))

    def _tell(
        self,
        sequence: Sequence,
        token: SampledToken | None,
        ending: Ending | None,
        *,
        scores: tuple[ScoredToken, ...] = (),
        vector: tuple[float, ...] | None = None,
    ) -> None:
        """Make one output, to be delivered with the next step; an ending also frees what is held."""
        if ending is not None and self._scheduler.get(sequence.id) is sequence:
            self._scheduler.finish(sequence)
        started = self._clock() if sequence.started is None else sequence.started
        reason, stop_token, error = _GOES_ON if ending is None else ending
        self._outputs.append(
            SequenceOutput(
                sequence.id, token, reason, stop_token, started, sequence.num_cached, error, scores, vector
            )
        )

    def _take_output(self, plan: StepPlan | None, began: float, seconds: SecondsByPart) -> StepOutput | None:
        if plan is None and not self._outputs and not self._has_new_levels:
            return None
        outputs = tuple(sorted(self._outputs, key=_is_end))
        self._outputs, self._has_new_levels = [], False
        now = self._clock()
        if seconds:
            rest = now - began - sum(part_s for _, part_s in seconds)
            seconds = ((Part.SCHEDULING, rest), *seconds)
        return StepOutput(outputs, self._scheduler.stats(plan, now - began, seconds), now)


def ending_after(sequence: Sequence, eos_token_ids: frozenset[int], max_model_len: int) -> Ending | None:
    """Whether the sequence is over with its newest token. None: it goes on.

    An end-of-sequence token that is also the last allowed one counts as STOP, as OpenAI's clients expect: the
    text is whole. (LoRAX calls that case "length".) One that is also among the stop tokens counts as end of
    sequence.
    """
    token, stop = sequence.tokens[-1], sequence.stop
    if sequence.num_generated >= stop.min_tokens:
        if (token in eos_token_ids or token in stop.eos_token_ids) and not stop.ignore_eos:
            return Ending(FinishReason.STOP)
        if token in stop.stop_token_ids:
            return Ending(FinishReason.STOP, stop_token=token)
    if sequence.num_generated >= stop.max_tokens or sequence.num_tokens >= max_model_len:
        return Ending(FinishReason.LENGTH)
    return None


def _check_answer(plan: StepPlan, answer: RunnerOutput) -> None:
    """A sequence that got no token although it should would be planned with nothing to compute for ever."""
    failed, going = set(answer.failed), plan.chunks
    if failed:
        if not failed <= {chunk.sequence.id for chunk in plan.chunks} or len(failed) < len(answer.failed):
            raise BrokenAnswer("the runner failed sequences that are not in the plan, or one of them twice")
        going = tuple(chunk for chunk in plan.chunks if chunk.sequence.id not in failed)
    drawn = {token.id for token in answer.tokens}
    if len(drawn) < len(answer.tokens) or drawn != {c.sequence.id for c in going if c.samples}:
        raise BrokenAnswer("the runner answered for other sequences than those that reached their last token")
    scored = {c.sequence.id: len(c.scored) for c in going if c.sequence.is_unscored and c.scored}
    if {found.id: len(found.tokens) for found in answer.scores} != scored:
        raise BrokenAnswer("the runner scored other prompt tokens than those that were asked for")
    pooled = {c.sequence.id for c in going if c.sequence.pooling is not None and c.is_last}
    if {found.id for found in answer.vectors} != pooled:
        raise BrokenAnswer("the runner made vectors of other sequences than those that are to be pooled")


def _is_end(output: SequenceOutput) -> bool:
    return output.finish is not None
