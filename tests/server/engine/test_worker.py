"""The engine thread. Every wait has a limit, nothing sleeps."""

import threading
from queue import SimpleQueue

import pytest

from server.engine.plan import Add, End, StepOutput
from server.engine.sequence import SequenceId
from server.engine.worker import MAX_UNACKNOWLEDGED, EngineDied, EngineWorker
from server.types import FinishReason, SamplingParams, StopCriteria
from tests.fakes import WrongPlan, make_core

LIMIT_S = 10.0


class Listener:
    """Takes deliveries as an event loop would; acknowledges them unless told not to."""

    def __init__(self, worker: EngineWorker, acknowledges: bool = True) -> None:
        self.worker = worker
        self.acknowledges = acknowledges
        self.delivered: SimpleQueue[StepOutput | EngineDied] = SimpleQueue()
        self.threads: set[str] = set()

    def __call__(self, news: StepOutput | EngineDied) -> None:
        self.threads.add(threading.current_thread().name)
        self.delivered.put(news)
        if self.acknowledges and isinstance(news, StepOutput):
            self.worker.acknowledge()

    def next(self) -> StepOutput | EngineDied:
        return self.delivered.get(timeout=LIMIT_S)

    def until_finish(self) -> tuple[list[int], FinishReason]:
        """The tokens of the only sequence, and why it ended."""
        tokens: list[int] = []
        while True:
            output = self.next()
            assert isinstance(output, StepOutput)
            for news in output.outputs:
                if news.token is not None:
                    tokens.append(news.token.token_id)
                if news.finish is not None:
                    return tokens, news.finish


def add(number: int = 1, max_tokens: int = 3) -> Add:
    stop = StopCriteria(max_tokens=max_tokens, ignore_eos=True)
    return Add(SequenceId(number), (1, 2, 3), SamplingParams(), stop, seed=0, adapter=None)


class Gate:
    """Holds the runner at the start of each step until it is opened."""

    def __init__(self) -> None:
        self.arrivals = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)

    def __call__(self, point: str) -> None:
        if point == "start":
            self.arrivals.release()
            assert self.permits.acquire(timeout=LIMIT_S)

    def wait_for_arrival(self) -> None:
        assert self.arrivals.acquire(timeout=LIMIT_S)

    def open(self, times: int = 1) -> None:
        self.permits.release(times)


def test_commands_go_in_and_outputs_come_out_of_one_thread() -> None:
    worker = EngineWorker(make_core())
    listener = Listener(worker)
    worker.put(add(1))  # before the start is early enough
    worker.start(listener)
    tokens, reason = listener.until_finish()
    assert (len(tokens), reason) == (3, FinishReason.LENGTH)
    worker.put(add(2))
    again, _ = listener.until_finish()
    assert again == tokens
    worker.stop()
    assert len(listener.threads) == 1


def test_an_idle_worker_waits_and_wakes_up_for_a_command() -> None:
    worker = EngineWorker(make_core())
    listener = Listener(worker)
    worker.start(listener)
    worker.put(End(SequenceId(5), FinishReason.ABORT))  # of nobody: no news
    worker.put(add())
    assert listener.until_finish()[1] is FinishReason.LENGTH
    assert listener.delivered.empty()
    worker.stop()


def test_commands_are_handled_between_steps() -> None:
    gate = Gate()
    worker = EngineWorker(make_core(interrupt=gate))
    listener = Listener(worker)
    worker.start(listener)
    worker.put(add(max_tokens=1000))
    gate.wait_for_arrival()
    worker.put(End(SequenceId(1), FinishReason.ABORT))
    gate.open()
    tokens, reason = listener.until_finish()
    assert (len(tokens), reason) == (1, FinishReason.ABORT)
    worker.stop()


def test_an_event_loop_that_does_not_acknowledge_stops_the_engine_after_two_outputs() -> None:
    gate = Gate()
    worker = EngineWorker(make_core(interrupt=gate))
    listener = Listener(worker, acknowledges=False)
    worker.start(listener)
    worker.put(add(max_tokens=1000))
    gate.open(times=1000)
    for _ in range(MAX_UNACKNOWLEDGED + 1):
        gate.wait_for_arrival()  # one step more than may be delivered is computed
    for _ in range(MAX_UNACKNOWLEDGED):
        listener.next()
    assert listener.delivered.empty()
    worker.acknowledge()
    listener.next()
    gate.wait_for_arrival()
    assert listener.delivered.empty()
    worker.stop(LIMIT_S)
    assert not worker.is_alive
    assert listener.delivered.empty(), "after stop nothing is delivered"


def test_stop_ends_an_idle_a_busy_and_a_waiting_thread() -> None:
    idle, busy, never_started = (EngineWorker(make_core()) for _ in range(3))
    listener = Listener(busy)
    idle.start(Listener(idle))
    busy.start(listener)
    busy.put(add(max_tokens=4000))
    listener.next()
    for worker in (idle, busy, never_started):
        worker.stop(LIMIT_S)
        assert not worker.is_alive
    while not listener.delivered.empty():
        assert isinstance(listener.next(), StepOutput)


@pytest.mark.parametrize("acknowledges", [True, False])
def test_the_death_of_the_thread_is_told_once_whatever_is_unacknowledged(
    acknowledges: bool, caplog: pytest.LogCaptureFixture
) -> None:
    steps = iter(range(MAX_UNACKNOWLEDGED))

    def interrupt(point: str) -> None:
        if point == "start" and next(steps, None) is None:
            raise WrongPlan("a bug")

    worker = EngineWorker(make_core(interrupt=interrupt))
    listener = Listener(worker, acknowledges)
    worker.start(listener)
    worker.put(add(max_tokens=100))
    for _ in range(MAX_UNACKNOWLEDGED):
        assert isinstance(listener.next(), StepOutput)
    last = listener.next()
    assert isinstance(last, EngineDied)
    assert "a bug" not in last.error
    worker.stop(LIMIT_S)
    assert not worker.is_alive
    assert listener.delivered.empty()
    assert "engine thread died" in caplog.text


def test_a_command_that_breaks_the_core_is_a_death_too() -> None:
    worker = EngineWorker(make_core())
    listener = Listener(worker)
    worker.start(listener)
    worker.put(add(1, max_tokens=1000))
    worker.put(add(1, max_tokens=1000))  # an id is used once
    while not isinstance(news := listener.next(), EngineDied):
        assert isinstance(news, StepOutput)
    worker.stop(LIMIT_S)
