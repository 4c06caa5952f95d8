"""One accepted request while it lives: its choices, its lease on an adapter, its reader.

Two ends must not be confused. A choice is *finished* when its client has been shown a finish; a sequence is
*confirmed* when the engine has said its last word about it, and so holds nothing of it any more. The
adapter is released, and the request counted, when the last sequence is confirmed; that happens once,
whatever ended it.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from adapters.types import AdapterRef
from server.engine.invocation import last_start
from server.engine.output import Choice
from server.engine.plan import Add
from server.engine.quotas import Permit
from server.engine.sequence import SequenceId
from server.engine.stream import Listeners, Outbox
from server.meters import Meter
from server.metrics import RequestStats
from server.text.stop_strings import StopStrings
from server.text.tokenizer import Tokenizer
from server.types import Finish, FinishReason, GenerationRequest, Timing

# The reason that stands for the whole request when its choices ended differently: the worst one.
_WORST_FIRST = (FinishReason.ERROR, FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP)


class Lease(Protocol):
    """The right to use what the request uses, which has to be given back; `release` is idempotent."""

    @property
    def extras(self) -> object | None: ...

    def release(self) -> None: ...


@dataclass(slots=True, eq=False)
class Generation:
    """Owned by the service, used on the event loop alone."""

    request: GenerationRequest
    lease: Lease | None
    choices: dict[SequenceId, Choice]
    unconfirmed: set[SequenceId]
    num_unfinished: int
    meter: Meter  # of its adapter
    permit: Permit | None  # what it counts as where there are hard limits
    outbox: Outbox
    is_behind: bool = False  # its reader is far behind
    is_on_hold: bool = False  # whoever holds its stream wants no tokens for now
    patience: asyncio.TimerHandle | None = None  # ends a generation whose reader stays far behind

    @property
    def is_paused(self) -> bool:
        return self.is_behind or self.is_on_hold

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        """Those it uses."""
        return () if self.request.adapter is None else self.request.adapter.refs

    def commands(self, tokenizer: Tokenizer) -> Iterator[Add]:
        """One for each choice, as the engine begins with it."""
        request = self.request
        stop = replace(request.stop, eos_token_ids=tuple(tokenizer.eos_token_ids))
        starts = tuple(map(self._adapter_start, request.prompts))
        for choice in self.choices.values():
            start = starts[choice.index // request.n]
            yield Add(
                id=choice.id,
                prompt_ids=request.prompt_of(choice.index),
                sampling=request.sampling,
                stop=stop,
                seed=choice.seed,
                adapter=None if start is None else request.adapter,
                pooling=request.pooling,
                tenant=request.tenant,
                weight=request.weight,
                adapter_start=start or 0,
            )

    def _adapter_start(self, prompt: tuple[int, ...]) -> int | None:
        """Where in a prompt the adapter begins to be active; None: nowhere."""
        invocation = self.request.invocation_tokens
        return last_start(prompt, invocation) if invocation else 0

    def unfinished(self) -> Iterator[Choice]:
        return (choice for choice in self.choices.values() if choice.finish is None)

    def stats(self) -> RequestStats:
        """The request as a whole. Only when all its choices are finished."""
        finishes = [choice.finish for choice in self.choices.values() if choice.finish is not None]
        reasons = {finish.reason for finish in finishes}
        return RequestStats(
            request_id=self.request.request_id,
            adapter=None if self.request.adapter is None else self.request.adapter.name,
            reason=next(reason for reason in _WORST_FIRST if reason in reasons),
            n=self.request.num_choices,
            max_tokens=self.request.stop.max_tokens,
            prompt_tokens=self.request.num_prompt_tokens,
            cached_tokens=sum(self._cached_tokens(finishes)),
            generated_tokens=sum(finish.usage.generated_tokens for finish in finishes),
            timing=_overall(finishes),
        )

    def _cached_tokens(self, finishes: list[Finish]) -> Iterator[int]:
        """Of each prompt, by the choice that found the most."""
        for start in range(0, self.request.num_choices, self.request.n):
            yield max(finish.usage.cached_tokens for finish in finishes[start : start + self.request.n])


def begin_generation(
    request: GenerationRequest,
    lease: Lease | None,
    *,
    ids: Iterator[SequenceId],
    tokenizer: Tokenizer,
    own_seed: int,
    queued: float,
    meter: Meter,
    permit: Permit | None,
    listeners: Listeners,
) -> Generation:
    """`own_seed`: of a request that brings none, in which equal prompts shall differ. With a seed of the
    client's each prompt gives what it would give alone.
    """
    stops = StopStrings(request.stop.stop, request.stop.keep_stop) if request.stop.stop else None
    seed = request.sampling.seed
    choices = {}
    for index in range(request.num_choices):
        choice = Choice(
            next(ids),
            request,
            tokenizer,
            None if stops is None else stops.again(),
            index=index,
            seed=own_seed + index if seed is None else seed + index % request.n,
            queued=queued,
        )
        choices[choice.id] = choice
    return Generation(request, lease, choices, set(choices), len(choices), meter, permit, Outbox(listeners))


def _overall(finishes: list[Finish]) -> Timing:
    """From the first choice that did something to the last one."""
    timings = [finish.timing for finish in finishes]
    return Timing(
        received=timings[0].received,
        queued=timings[0].queued,
        started=min(timing.started for timing in timings),
        first_token=min(timing.first_token for timing in timings),
        last_token=max(timing.last_token for timing in timings),
    )
