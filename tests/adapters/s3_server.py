"""moto's server, in a process of its own: S3 as its makers' tests know it. `make test` installs it."""

import queue
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PYTHON = Path(__file__).resolve().parents[2] / ".venv-moto" / "bin" / "python"
START_LIMIT_S = 60


@contextmanager
def running_s3() -> Iterator[str]:
    """Its address."""
    assert PYTHON.exists(), "`make test` makes this environment"
    process = subprocess.Popen(
        [PYTHON, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    found: queue.Queue[str] = queue.Queue()
    follower = threading.Thread(target=_follow, args=(process, found))
    follower.start()
    try:
        yield found.get(timeout=START_LIMIT_S)
    finally:
        process.kill()
        process.wait()
        follower.join()
        assert process.stderr is not None
        process.stderr.close()


def _follow(process: "subprocess.Popen[str]", found: "queue.Queue[str]") -> None:
    """To the end: it logs every request, and would wait if nobody read that."""
    assert process.stderr is not None
    for line in process.stderr:
        match = re.search(r"Running on (http://127\.0\.0\.1:\d+)", line)
        if match is not None:
            found.put(match[1])
