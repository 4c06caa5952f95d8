"""The asyncio side of the engine: requests in, streams out.

    event loop                                          engine thread

    submit ──────────────────── Add ──────────────────────> core
    TokenStream.close ────────── End ─────────────────────>   │
    slow reader, or pause ─ Pause, Resume ────────────────>   │ step
                                                              v
    Choice.advance <── _deliver <── call_soon_threadsafe ── StepOutput
       │      └───────────── acknowledge ─────────────────> next step
       v
    Outbox ──> TokenStream ──> reader

Everything here but `_deliver` and `_drop` runs on the event loop, and no method that changes state awaits,
so each one sees and leaves a consistent picture without locks. What is promised:

* Every accepted request ends with exactly one finish per choice, whatever happens to client, engine or
  server.
* Its adapter is released exactly once, when the engine holds nothing of it any more.
* A reader that falls behind is paused, then ended, and costs nobody else anything.
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from adapters.named import unknown_adapter
from adapters.types import Clock, Revision
from server.engine.adapter_users import AdapterUsers
from server.engine.card import ModelCard
from server.engine.generation import Generation, Lease, begin_generation
from server.engine.leases import LeaseSet, Merge, hold_merged, hold_one, hold_set
from server.engine.output import Choice
from server.engine.plan import End, Pause, Resume, SequenceOutput, StepOutput, StepStats
from server.engine.queue_bound import MAX_RETRY_AFTER_S, QueueBound
from server.engine.quotas import Quotas
from server.engine.refusals import refusal_of
from server.engine.sequence import SequenceId
from server.engine.stream import Listeners, TokenStream
from server.engine.worker import EngineDied, EngineWorker
from server.errors import BadRequest, Overloaded, ServeError, Unavailable
from server.garbage import collect_in_lull
from server.log import log_request, without_text
from server.metrics import Metrics
from server.text.adapter_text import AdapterText
from server.text.tokenizer import Tokenizer
from server.types import FinishReason, GenerationRequest, Retired
from server.wishes import NO_WISH, AdapterWish

if TYPE_CHECKING:
    from adapters.registry import AdapterRegistry

logger = logging.getLogger(__name__)

_SEED_BITS = 48  # a drawn seed is shown to clients, and JavaScript keeps only 53 bits of an integer
_SLICE = 16  # outputs that are turned into text, and written, before the event loop serves others: 1 ms
_CONFIRM_S = 5.0  # how long a drain waits for the engine to let go of what was ended: some steps
_ANSWERS = (None, FinishReason.STOP, FinishReason.LENGTH)  # ends (or none yet) of what went well
_SHUTTING_DOWN = "the server is shutting down"


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What a client may use up."""

    max_num_seqs: int  # sequences that the engine runs at once
    max_queued_requests: int  # sequences beyond those; then 429
    max_unread_tokens: int = 1024  # of one stream, before it is paused
    send_timeout_s: float = 30.0  # how long a paused stream waits for its reader
    seed: int | None = None  # of requests that bring none; None: drawn for each


class Service:
    """One per process. Made and used on the event loop; `start` once, `stop` at the end."""

    def __init__(
        self,
        *,
        card: ModelCard,
        tokenizer: Tokenizer,
        registry: "AdapterRegistry",
        pool: Executor,
        worker: EngineWorker,
        metrics: Metrics,
        limits: ServiceLimits,
        merge: Merge | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`merge`: None refuses merges."""
        self.card = card
        self.tokenizer = tokenizer
        self.registry = registry
        self.pool = pool
        self._worker = worker
        self._metrics = metrics
        self._limits = limits
        self._merge = merge
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ids = map(SequenceId, itertools.count(1))
        self._listeners = Listeners()
        self._live: dict[SequenceId, Generation] = {}  # until the engine's last word
        self._quotas = Quotas(clock, metrics.observe_refusal)
        self._users = AdapterUsers(self._cut_off)
        self._news: deque[StepOutput] = deque()  # not read to the end
        self._level: StepStats | None = None  # as of the newest step
        self._queue_bound = QueueBound(limits.max_num_seqs, limits.max_queued_requests, clock)
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._died = asyncio.Event()

    # --- Life ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread; its news comes to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._worker.start(self._deliver)

    async def stop(self) -> None:
        """End the engine thread after the step it is in, and whatever still runs. Call it after `drain`."""
        self._is_draining = True
        await asyncio.to_thread(self._worker.stop)
        self._end_everything("the server has stopped")

    @property
    def is_alive(self) -> bool:
        """Whether the engine can still answer."""
        return self._loop is not None and not self._died.is_set()

    async def died(self) -> None:
        """Return when the engine has died; every stream has been ended with an error by then."""
        await self._died.wait()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let the running ones end, and after `timeout_s` end the rest with an error
        event.
        """
        self._is_draining = True
        if await self._becomes_idle(timeout_s):
            return
        for generation in self._generations():
            self._end(generation, FinishReason.ABORT, _SHUTTING_DOWN)
        await self._becomes_idle(_CONFIRM_S)

    # --- Requests -----------------------------------------------------------------------------------------

    async def resolve(self, name: str | None, wish: AdapterWish = NO_WISH) -> LeaseSet | None:
        """What a client means by `name`, or by a wish for several adapters, held until released; None for the
        base model.

        Raises ModelNotFound, BadRequest or Unavailable, with the param that names the adapter.
        """
        with self._metrics.awaiting(*wish.names_for(name)):
            if wish.parts is not None:
                return await hold_set(self.registry, wish.parts, wish)
            if wish.merge is not None:
                if self._merge is None:
                    raise BadRequest("this server does not merge adapters", param=wish.merge.param)
                return await hold_merged(self.registry, self._merge, wish.merge, wish)
            if self.card.is_base(name):
                return None
            assert name is not None, "no name means the base model"
            return await hold_one(self.registry, name, wish)

    def tokenizer_for(self, lease: Lease | None) -> Tokenizer:
        """The adapter's own, if it brings one along; else the base model's."""
        text = None if lease is None else lease.extras
        return text.tokenizer if isinstance(text, AdapterText) else self.tokenizer

    def unknown(self, name: str, param: str = "model") -> ServeError:
        """What `resolve` raises for a name that nothing has, said in `param`."""
        return refusal_of(unknown_adapter(name), param)

    @property
    def resident(self) -> frozenset[Revision]:
        """The adapters on the device, as of the newest step: none leaves it before the next."""
        return (
            frozenset(ref.revision for ref in self._level.adapters_resident) if self._level else frozenset()
        )

    async def retire(self, name: str, *, force: bool = False, wait_s: float = 0.0) -> Retired | None:
        """Take an adapter out of use; see `AdapterUsers.retire`."""
        return await self._users.retire(self.registry, name, force=force, wait_s=wait_s)

    def submit(self, request: GenerationRequest, lease: Lease | None) -> TokenStream:
        """Hand the request to the engine, and the lease over to the service.

        Raises Overloaded, Unavailable or ModelNotFound; then the lease is still the caller's.
        """
        self._check_admission(request.num_choices)
        if request.adapter is not None and not self._users.may_begin(request.adapter.refs):
            raise self.unknown(request.adapter.name)
        permit = self._quotas.admit(request)
        tokenizer = self.tokenizer_for(lease)
        generation = begin_generation(
            request,
            lease,
            ids=self._ids,
            tokenizer=tokenizer,
            own_seed=secrets.randbits(_SEED_BITS) if self._limits.seed is None else self._limits.seed,
            queued=self._clock(),
            meter=self._metrics.begin_request(
                None if request.adapter is None else request.adapter.counted_as
            ),
            permit=permit,
            listeners=self._listeners,
        )
        self._users.add(generation)
        self._idle.clear()
        for command in generation.commands(tokenizer):
            self._live[command.id] = generation
            self._worker.put(command)
        return TokenStream(
            request.request_id,
            request.num_prompt_tokens,
            generation.outbox,
            on_read=partial(self._caught_up, generation),
            on_pause=partial(self._hold, generation),
            on_resume=partial(self._release, generation),
            on_close=partial(self._close, generation),
            on_drop=partial(self._drop, generation),
        )

    def _check_admission(self, num_choices: int) -> None:
        if not self.is_alive:
            raise Unavailable("the engine has stopped", retry_after_s=MAX_RETRY_AFTER_S)
        if self._is_draining:
            raise Unavailable(_SHUTTING_DOWN, retry_after_s=MAX_RETRY_AFTER_S)
        try:
            self._queue_bound.check(len(self._live), num_choices, self._level)
        except Overloaded:
            self._metrics.observe_refusal("queue_full")
            raise

    # --- News from the engine -----------------------------------------------------------------------------

    def _deliver(self, news: StepOutput | EngineDied) -> None:
        """On the engine thread. A closed loop has no readers: then everything ends, and the engine goes
        idle.
        """
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._receive, news)
        except RuntimeError:
            if isinstance(news, StepOutput):
                for output in news.outputs:
                    self._worker.put(End(output.id, FinishReason.ABORT))
                self._worker.acknowledge()

    def _receive(self, news: StepOutput | EngineDied) -> None:
        if isinstance(news, EngineDied):
            self._died.set()
            self._end_everything(news.error)
            return
        self._news.append(news)
        if len(self._news) == 1:
            self._read_news(0)

    def _read_news(self, start: int) -> None:
        """The outputs of the oldest news from `start` on, a slice at a time.

        Each wakes a reader, and the readers of one slice write before the next one is read: so a new request
        or a question for /health waits for a slice, and not for a batch of 256 streams.
        """
        assert self._loop is not None
        news, stop = self._news[0], start + _SLICE
        try:
            for output in news.outputs[start:stop]:
                generation = self._live.get(output.id)
                if generation is not None:  # else the request was given up when the engine stopped
                    self._take(generation, output, news.at)
        finally:
            if stop < len(news.outputs):
                self._loop.call_soon(self._read_news, stop)
            else:
                self._end_news(news)

    def _end_news(self, news: StepOutput) -> None:
        assert self._loop is not None
        self._news.popleft()
        self._level = news.stats
        self._worker.acknowledge()
        self._loop.call_soon(self._after_news, news)
        if self._news:
            self._loop.call_soon(self._read_news, 0)

    def _after_news(self, news: StepOutput) -> None:
        """Its readers have written by now: what no token has to wait for."""
        self._metrics.observe_step(news.stats, sum(output.token is not None for output in news.outputs))
        if not self._news:
            collect_in_lull()

    def _take(self, generation: Generation, output: SequenceOutput, at: float) -> None:
        """One sequence's news: to its reader, and to the books if it is the last."""
        choice = generation.choices[output.id]
        if choice.finish is None:
            try:
                self._show(generation, choice, output, at)
            except Exception as error:  # our bug costs this request, not the step's other requests
                logger.error("request %s failed: %s", generation.request.request_id, without_text(error))
                self._end(generation, FinishReason.ERROR, "internal error")
        if output.token is not None and generation.permit is not None:
            generation.permit.spend(1)
        if output.finish is not None:
            self._confirm(generation, output.id)

    def _show(self, generation: Generation, choice: Choice, output: SequenceOutput, at: float) -> None:
        before = choice.last_token
        event = choice.advance(output, at)
        if event is None:
            return
        generation.outbox.put(event)
        if choice.finish is not None:
            self._finished(generation)
            if output.finish is None:  # a stop string, which the engine cannot see
                self._worker.put(End(choice.id, choice.finish.reason))
        elif generation.outbox.num_pending > self._limits.max_unread_tokens and not generation.is_behind:
            self._fall_behind(generation)
        if before is not None and event.token is not None:
            generation.meter.gap.observe(at - before)
        elif before is None and output.finish in _ANSWERS:
            self._count_prompt(generation, choice, output, at)

    def _count_prompt(
        self, generation: Generation, choice: Choice, output: SequenceOutput, at: float
    ) -> None:
        """It has its first answer: once for all choices over it."""
        if choice.index % generation.request.n:
            return
        num_prompt = len(generation.request.prompt_of(choice.index))
        self._metrics.observe_prompt(num_prompt, output.num_cached)
        if output.token is not None:
            generation.meter.first_token.observe(at - choice.received, generation.request.request_id, at)

    def _finished(self, generation: Generation) -> None:
        generation.num_unfinished -= 1
        if not generation.num_unfinished:
            generation.outbox.complete()
            generation.is_behind = False
            self._set_patience(generation)

    def _confirm(self, generation: Generation, sequence_id: SequenceId) -> None:
        """The engine holds nothing of this sequence any more."""
        del self._live[sequence_id]
        generation.unconfirmed.discard(sequence_id)
        if generation.unconfirmed:
            return
        if generation.lease is not None:
            generation.lease.release()
        if generation.permit is not None:
            generation.permit.release()
        self._users.remove(generation)
        self._queue_bound.note_end()
        stats = generation.stats()
        self._metrics.end_request(stats, generation.meter)
        log_request(stats)
        if not self._live:
            self._idle.set()

    # --- Ends from this side ------------------------------------------------------------------------------

    def _end(self, generation: Generation, reason: FinishReason, error: str | None) -> None:
        """Finish what is unfinished, at once for the reader; the engine confirms later. Idempotent."""
        at = self._clock()
        for choice in tuple(generation.unfinished()):
            self._worker.put(End(choice.id, FinishReason.ABORT))
            generation.outbox.put(choice.end(reason, at, error=error))
            self._finished(generation)

    def _cut_off(self, generation: Generation, message: str) -> None:
        """Its adapter is taken away."""
        self._end(generation, FinishReason.ABORT, message)

    def _close(self, generation: Generation) -> None:
        """The reader has gone."""
        generation.outbox.close()
        self._end(generation, FinishReason.ABORT, "the client has left")

    def _drop(self, generation: Generation) -> None:
        """The stream was collected, on whatever thread that happened."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: the engine has been stopped
            self._loop.call_soon_threadsafe(self._close, generation)

    def _end_everything(self, error: str) -> None:
        """The engine will say nothing more: end every stream, and confirm in its place."""
        for generation in self._generations():
            self._end(generation, FinishReason.ERROR, error)
            for sequence_id in tuple(generation.unconfirmed):
                self._confirm(generation, sequence_id)

    # --- Pauses: a generation rests while its reader is far behind, or while it is told to ------------------

    def _fall_behind(self, generation: Generation) -> None:
        """No more tokens until the reader has read, and an end if it does not."""
        self._metrics.observe_reader_pause()
        with self._pausing(generation):
            generation.is_behind = True

    def _caught_up(self, generation: Generation) -> None:
        """The reader has taken everything."""
        if generation.is_behind:
            with self._pausing(generation):
                generation.is_behind = False

    def _hold(self, generation: Generation) -> None:
        with self._pausing(generation):
            generation.is_on_hold = True

    def _release(self, generation: Generation) -> None:
        with self._pausing(generation):
            generation.is_on_hold = False

    @contextlib.contextmanager
    def _pausing(self, generation: Generation) -> Iterator[None]:
        """Around a change of the reasons: the engine is told when the first comes and when the last goes."""
        was_paused = generation.is_paused
        yield
        self._set_patience(generation)
        if generation.is_paused is not was_paused:
            command = Pause if generation.is_paused else Resume
            for choice in generation.unfinished():
                self._worker.put(command(choice.id))

    def _set_patience(self, generation: Generation) -> None:
        """It runs out on a reader that is far behind, but not while none is meant to read."""
        is_running_out = generation.is_behind and not generation.is_on_hold
        if is_running_out and generation.patience is None:
            assert self._loop is not None
            delay = self._limits.send_timeout_s
            generation.patience = self._loop.call_later(delay, self._give_up, generation)
        elif not is_running_out and generation.patience is not None:
            generation.patience.cancel()
            generation.patience = None

    def _give_up(self, generation: Generation) -> None:
        self._end(
            generation,
            FinishReason.ERROR,
            f"the client has not read for {self._limits.send_timeout_s:g} seconds",
        )

    # --- Small things -------------------------------------------------------------------------------------

    def _generations(self) -> list[Generation]:
        """Each live request once, oldest first."""
        return list({id(generation): generation for generation in self._live.values()}.values())

    async def _becomes_idle(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
