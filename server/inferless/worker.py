"""One Inferless app: its queue, the process that works it off, and what happens when that fails.

    submit ──> queue ──> running ──> the app's process ──> AppRun ──> reader
                 │                        │
              429 beyond              fails: the running request ends with an error, the queue waits for
              the bound               the next process; fails to start: the queue ends with 503

An app does one request at a time (or one batch, if it says so), in the order of arrival. A process that fails
is replaced after a pause that doubles from failure to failure and is forgotten after a success.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from adapters.types import Clock
from server.errors import BadRequest, EngineFailed, Overloaded, PayloadTooLarge, ServeError, Unavailable
from server.inferless.process import AppFailed, AppProcess
from server.inferless.run import AppRun
from server.inferless.schema import AppSchema, schema_from_json
from server.inferless.wire import (
    Done,
    End,
    Failed,
    FrameTooLarge,
    Gone,
    Loaded,
    Message,
    Output,
    Ready,
    Stop,
    Took,
    infer_frame,
)
from server.log import without_text

log = logging.getLogger("motet.inferless")

_RETRY_AFTER_S = 5
_MOST_DOUBLINGS = 30  # of the pause; more would overflow


@dataclass(frozen=True, slots=True)
class AppLimits:
    """What an app may take. Times are seconds."""

    max_queued: int = 128  # requests behind the one that runs; then 429
    max_queued_bytes: int = 64 * 2**20  # of their inputs, but for the last one's; then 429, too
    start_s: float = 600.0  # import and `initialize`
    infer_s: float = 600.0  # one call of `infer`
    finalize_s: float = 10.0
    first_pause_s: float = 0.5  # before a process that failed is replaced
    longest_pause_s: float = 60.0


@dataclass(frozen=True, slots=True)
class AppSurroundings:
    """What an app's process is started with."""

    environment: Mapping[str, str] = field(default_factory=dict)
    output: Path | None = None  # the file that gets what it prints; None: nothing does


class AppState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"  # it could not be started; it will be tried again
    STOPPED = "stopped"


class AppWorker:
    """Made and used on the event loop."""

    def __init__(
        self, name: str, folder: Path, surroundings: AppSurroundings, limits: AppLimits, clock: Clock
    ) -> None:
        self.name = name
        self.state = AppState.STOPPED
        self.schema: AppSchema | None = None  # known once the folder was imported
        self.reason = ""  # why it is not ready
        self._folder = folder
        self._surroundings = surroundings
        self._limits = limits
        self._clock = clock
        self._life: asyncio.Task[None] | None = None
        self._process: AppProcess | None = None
        self._queue: deque[AppRun] = deque()
        self._running: dict[int, AppRun] = {}
        self._last_id = 0
        self._num_failures = 0  # since the last success
        self._is_stopping = False
        self._is_initialized = False  # the process has been ready
        self._has_news = asyncio.Event()  # the queue has grown
        self._is_ready = asyncio.Event()  # the process takes a request
        self._is_done = asyncio.Event()  # it has returned from `infer`
        self._idle = asyncio.Event()
        self._idle.set()

    # --- Life ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to live; returns at once. Does nothing to an app that lives."""
        if self._life is None:
            self._is_stopping = False
            self._num_failures = 0
            self.state, self.reason = AppState.STARTING, "the app is starting"
            self._life = asyncio.create_task(self._live())

    async def stop(self, drain_s: float) -> None:
        """Refuse new requests, let the others end for `drain_s`, finalize the app and end its process."""
        await self.drain(drain_s)
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
            self._life = None
        self.state, self.reason = AppState.STOPPED, "the app is unloaded"

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, and return when the others have ended, after `timeout_s` by force."""
        self._is_stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        stopping = Unavailable("the app is going down", retry_after_s=_RETRY_AFTER_S)
        self._refuse_queue(stopping)
        for run in self._running.values():
            run.finish(stopping)
            self._tell_gone(run)

    async def _live(self) -> None:
        """The outermost frame of the app's life: one process after the other."""
        while True:
            try:
                await self._live_once()
            except* AppFailed as failures:
                self._note_failure(str(failures.exceptions[0]))
            except* Exception as failures:  # our own bug: the app's next process may do without it
                log.error("app %s: %s", self.name, without_text(failures.exceptions[0]))
                self._note_failure("internal error")
            await asyncio.sleep(self._pause_s())

    async def _live_once(self) -> None:
        """One process, until it fails. Raises: ExceptionGroup of AppFailed."""
        self._is_ready.clear()
        self._is_done.clear()
        self._is_initialized = False
        began = self._clock()
        process = await AppProcess.start(
            self._folder, self._surroundings.environment, self._surroundings.output
        )
        self._process = process
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._read(process))
                both.create_task(self._work(process, began))
        except BaseExceptionGroup:
            process.kill()
            raise
        finally:
            self._process = None
            process.send(Stop())
            # One that is still in `initialize` has nothing to finalize, and would not hear us.
            await process.stop(self._limits.finalize_s if self._is_initialized else 0)

    async def _work(self, process: AppProcess, began: float) -> None:
        """Give the process its requests. Raises: AppFailed if one of its steps takes too long."""
        while True:
            await self._in_time(self._is_ready, self._limits.start_s, "`initialize` takes")
            self._is_ready.clear()
            if self.state is not AppState.READY:
                log.info("app %s is ready after %.1f s", self.name, self._clock() - began)
                self.state, self.reason = AppState.READY, ""
            while not self._hand_over(await self._take_batch(), process):
                pass
            await self._in_time(self._is_done, self._limits.infer_s, "`infer` takes")
            self._is_done.clear()
            began = self._clock()

    def _hand_over(self, batch: Sequence[AppRun], process: AppProcess) -> bool:
        """Send requests to the process; false, and their end, if they are too large together."""
        try:
            process.send_frame(infer_frame([run.id for run in batch], [run.inputs for run in batch]))
        except FrameTooLarge:
            for run in batch:
                self._end(run, PayloadTooLarge("the inputs are too large for this app"))
            self._running.clear()
            self._check_idle()
            return False
        return True

    async def _in_time(self, event: asyncio.Event, seconds: float, what: str) -> None:
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            raise AppFailed(f"{what} longer than {seconds:g} seconds") from None

    def _note_failure(self, reason: str) -> None:
        """The process is gone. One that was ready is replaced for the queue, others take the queue along."""
        log.error("app %s: %s", self.name, reason)
        for run in tuple(self._running.values()):
            self._end(run, EngineFailed("the app has failed; it is being started again"))
        self._running.clear()
        self._num_failures += 1
        if self.state is AppState.READY:
            self.state, self.reason = AppState.STARTING, "the app is being started again"
        else:
            self.state, self.reason = AppState.FAILED, "the app cannot be started"
            self._refuse_queue(Unavailable(self.reason, retry_after_s=_RETRY_AFTER_S))
        self._check_idle()

    def _pause_s(self) -> float:
        doublings = min(self._num_failures - 1, _MOST_DOUBLINGS)
        return min(self._limits.first_pause_s * 2.0**doublings, self._limits.longest_pause_s)

    # --- Requests -----------------------------------------------------------------------------------------

    def submit(self, request_id: str, inputs: bytes) -> AppRun:
        """Queue a request whose inputs, a JSON object, have been checked. Raises: Unavailable, Overloaded."""
        self.require_schema()
        num_bytes = sum(len(run.inputs) for run in self._queue)
        if len(self._queue) >= self._limits.max_queued or num_bytes >= self._limits.max_queued_bytes:
            raise Overloaded(
                f"{len(self._queue)} requests are waiting for this app; try again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._last_id += 1
        run = AppRun(self._last_id, request_id, inputs, on_take=self._took, on_close=self._close)
        self._queue.append(run)
        self._idle.clear()
        self._has_news.set()
        return run

    def require_schema(self) -> AppSchema:
        """What the app takes. Raises: Unavailable while it takes nothing."""
        is_down = self.state in (AppState.STOPPED, AppState.FAILED) or self._is_stopping
        if is_down or self.schema is None:
            raise Unavailable(self.reason or "the app is going down", retry_after_s=_RETRY_AFTER_S)
        return self.schema

    async def _take_batch(self) -> Sequence[AppRun]:
        """The next request, or as many as the app takes at once and come within its window."""
        assert self.schema is not None
        size = self.schema.batch_size or 1
        await self._until_queued(1)
        if size > 1:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.schema.batch_window_s):
                    await self._until_queued(size)
            await self._until_queued(1)  # who came first may have left since
        batch = [self._queue.popleft() for _ in range(min(size, len(self._queue)))]
        self._running = {run.id: run for run in batch}
        return batch

    async def _until_queued(self, count: int) -> None:
        while len(self._queue) < count:
            self._has_news.clear()
            await self._has_news.wait()

    def _took(self, run: AppRun) -> None:
        if run.id in self._running and self._process is not None:
            self._process.send(Took(run.id, 1))

    def _close(self, run: AppRun) -> None:
        """The reader has gone. What runs goes on in the app, unread: stopping it is not for us."""
        if run.id in self._running:
            self._tell_gone(run)
        else:
            self._queue.remove(run)
            self._check_idle()

    def _tell_gone(self, run: AppRun) -> None:
        if self._process is not None:
            self._process.send(Gone(run.id))

    def _refuse_queue(self, error: ServeError) -> None:
        while self._queue:
            self._queue.popleft().finish(error)
        self._check_idle()

    def _end(self, run: AppRun, error: ServeError | None) -> None:
        if not run.is_over:
            run.finish(error)
            log.info(
                "app %s: request %s outputs=%d%s",
                self.name,
                run.request_id,
                run.num_outputs,
                " failed" if error is not None else " left" if run.is_closed else "",
            )

    def _check_idle(self) -> None:
        if not self._queue and not self._running:
            self._idle.set()

    # --- News from the process ----------------------------------------------------------------------------

    async def _read(self, process: AppProcess) -> None:
        """Raises: AppFailed when the process fails or ends."""
        while True:
            self._receive(await process.receive())

    def _receive(self, message: Message) -> None:
        match message:
            case Loaded():
                try:
                    self.schema = schema_from_json(message.schema)
                except (TypeError, KeyError):
                    raise AppFailed("its process has sent a schema that is none") from None
            case Ready():
                self._is_initialized = True
                self._is_ready.set()
            case Output():
                if (run := self._running.get(message.id)) is not None:
                    run.put(message.values)
            case End():
                if (run := self._running.get(message.id)) is not None:
                    self._end(run, _refusal(message))
            case Done():
                self._finish_batch(message.fault)
            case Failed():
                raise AppFailed(message.error)
            case _:
                raise AppFailed("its process has sent a message that is the server's")

    def _finish_batch(self, fault: str | None) -> None:
        for run in tuple(self._running.values()):
            self._end(run, None)
        self._running.clear()
        self._num_failures = 0
        if fault is not None:
            log.error("app %s: infer raised %s; the app is made anew", self.name, fault)
            self.state, self.reason = AppState.STARTING, "the app is being initialized again"
        self._is_done.set()
        self._check_idle()


def _refusal(end: End) -> ServeError | None:
    if end.error is None:
        return None
    return BadRequest(end.error) if end.blame == "input" else EngineFailed(end.error)
