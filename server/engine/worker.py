"""The engine thread: commands in, step outputs out.

    any thread            engine thread                                     event loop
    put(command) ──> inbox ──> core.handle ──> core.step ──> deliver(output) ──> ... ──> acknowledge()
                               ^ blocks here when idle       ^ blocks before a third unacknowledged output

At most two outputs are under way: so the forward pass overlaps with the event loop's work on the step before,
but an event loop that falls behind slows the engine instead of growing a queue. It is the event loop that
acknowledges, never a reader: a slow client is the service's business.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from server.engine.core import EngineCore
from server.engine.plan import Command, StepOutput

logger = logging.getLogger(__name__)

MAX_UNACKNOWLEDGED = 2


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The last delivery, when the engine thread has failed: whoever still lives will hear nothing more."""

    error: str  # client-safe


@dataclass(frozen=True, slots=True)
class _Stop:
    """Inbox message: end the thread."""


class EngineWorker:
    """Runs an EngineCore on its own thread. `start` once; `put` and `acknowledge` from any thread."""

    def __init__(self, core: EngineCore, thread: Executor | None = None) -> None:
        """`thread` has one thread, which becomes the engine's for good. It may have done other work before:
        the model is loaded on it, because OpenMP keeps a team of threads for every thread that ever computed,
        and with more teams than cores each parallel region begins with a sleep instead of a spin.
        """
        self._core = core
        self._executor = thread or ThreadPoolExecutor(1, thread_name_prefix="motet-engine")
        self._inbox: SimpleQueue[Command | _Stop] = SimpleQueue()
        self._permits = threading.Semaphore(MAX_UNACKNOWLEDGED)
        self._running: Future[None] | None = None
        self._is_stopping = False

    @property
    def is_alive(self) -> bool:
        return self._running is not None and not self._running.done()

    def start(self, deliver: Callable[[StepOutput | EngineDied], None]) -> None:
        """`deliver` is called on the engine thread and must not block."""
        assert self._running is None, "a worker is started once"
        self._running = self._executor.submit(self._main, deliver)

    def put(self, command: Command) -> None:
        self._inbox.put(command)

    def acknowledge(self) -> None:
        """One StepOutput has been consumed."""
        self._permits.release()

    def stop(self, timeout_s: float | None = None) -> None:
        """End the thread after the step it is in, and wait for that. What still lives gets no more output."""
        self._is_stopping = True
        self._inbox.put(_Stop())
        self._permits.release()  # it may be waiting for an acknowledgement that will not come
        if self._running is not None:
            wait((self._running,), timeout_s)
        self._executor.shutdown(wait=False)

    def _main(self, deliver: Callable[[StepOutput | EngineDied], None]) -> None:
        try:
            while self._take_commands():
                self._hand_over(self._core.step(), deliver)
        except BaseException:  # the thread's outermost frame: nobody else could tell the streams
            logger.exception("engine thread died")
            deliver(EngineDied("the engine has stopped after an internal error"))

    def _take_commands(self) -> bool:
        """Handle what is in the inbox; when there is nothing else to do, wait for it. False: stop."""
        while not self._is_stopping:
            try:
                message = self._inbox.get(block=not self._core.has_work)
            except Empty:
                return True
            if not isinstance(message, _Stop):
                self._core.handle(message)
        return False

    def _hand_over(
        self, output: StepOutput | None, deliver: Callable[[StepOutput | EngineDied], None]
    ) -> None:
        if output is None:
            return
        self._permits.acquire()
        if not self._is_stopping:
            deliver(output)
