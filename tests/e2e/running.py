"""A `motet serve` process of a test's own, on a free port, and what it says."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import httpx
import pytest

from tests.nursery import Nursery, Offspring

START_LIMIT_S = 90
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class RunningServer:
    """A `motet serve` process and what it has said so far."""

    process: subprocess.Popen[str] | Offspring
    lines: list[str] = field(default_factory=list)
    url: str = ""
    _said: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def _follow(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._said:
                self.lines.append(line.rstrip("\n"))
                self._said.notify_all()
        with self._said:
            self._said.notify_all()

    def wait_for(self, pattern: str, limit_s: float = START_LIMIT_S) -> re.Match[str]:
        """The first line that matches; fails with everything the server said if there is none in time."""

        def found() -> re.Match[str] | None:
            return next((match for line in self.lines if (match := re.search(pattern, line))), None)

        with self._said:
            self._said.wait_for(lambda: found() or self.process.poll() is not None, timeout=limit_s)
            match = found()
        if match is None:
            pytest.fail(f"the server never said {pattern!r}; it said:\n" + "\n".join(self.lines))
        return match

    def metric(self, name: str) -> float:
        """Sum of a metric's samples."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return sum(
            float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.M)
        )

    def wait_until_idle(self, limit_s: float = 30) -> None:
        """Ask the server until nothing runs and no KV block is held; fails if that takes too long."""
        limit = time.monotonic() + limit_s
        while held := self.metric("vllm:num_requests_running") + self.metric("vllm:kv_cache_usage_perc"):
            assert time.monotonic() < limit, f"still held: {held}"

    def stop(self, limit_s: float = 30) -> int:
        """SIGTERM; the exit status. Everything it said is in `lines` then."""
        self.process.terminate()
        return self.end(limit_s)

    def end(self, limit_s: float = START_LIMIT_S) -> int:
        """Wait for it to end by itself; the exit status. Everything it said is in `lines` then."""
        try:
            return self.process.wait(limit_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it if it still runs, and close what we had open of it."""
        self.process.kill()
        self.process.wait(10)
        self._follower.join(10)
        if self.process.stderr is not None:
            self.process.stderr.close()


def start(
    *flags: str,
    nursery: Nursery | None,
    environment: Mapping[str, str] = MappingProxyType({}),
    wait: bool = True,
) -> RunningServer:
    """`motet serve --port 0 FLAGS`; waits until it is ready unless told otherwise. Without a nursery it is a
    program that begins with its imports, and with the variables that they read.
    """
    words = ("serve", "--port", "0", *flags)
    if nursery is None:
        process: subprocess.Popen[str] | Offspring = subprocess.Popen(
            [sys.executable, "-m", "server", *words],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MOTET_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
    else:
        process = nursery.fork(*words, environment=environment)
    server = RunningServer(process)
    try:
        server.url = server.wait_for(r"listening on (http://[^\s,]+)").group(1)
        if wait:
            server.wait_for(r"ready")
    except BaseException:
        server.kill()
        raise
    return server
