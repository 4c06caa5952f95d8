"""Who computes at which priority."""

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.threads import NUM_LOADERS, Threads

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="niceness is the process's there")


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads()
    yield made
    made.close()


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def niceness_of(executor: ThreadPoolExecutor, num_threads: int) -> set[int]:
    """Of every thread of the executor."""
    meeting = threading.Barrier(num_threads, timeout=10)

    def ask() -> int:
        meeting.wait()  # nobody answers twice
        return niceness()

    return {asked.result() for asked in [executor.submit(ask) for _ in range(num_threads)]}


@linux_only
def test_loaders_give_way_to_everybody_else(threads: Threads) -> None:
    ours = niceness()

    loaders = niceness_of(threads.loaders, NUM_LOADERS)

    assert loaders == {min(19, ours + 10)}
    assert niceness_of(threads.engine, 1) == niceness_of(threads.pool, 4) == {ours}
    assert niceness() == ours


@linux_only
def test_adapters_are_read_where_priorities_may_not_be_changed(
    threads: Threads, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(which: int, who: int, priority: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", refuse)

    assert threads.loaders.submit(lambda: "read").result(10) == "read"
    assert "Operation not permitted" in caplog.text
