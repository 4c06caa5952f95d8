"""A process of its own for what strangers wrote: programs, and files whose meaning takes long to find.

    Sandbox.ask(job, *blobs) ── frame ──> sandbox_child ── frame ──> answer

A chat template is a program, and an interpreter in our own process cannot bound it: loops in loops, or one
string repeated often enough, would hold up every stream or take all memory. The child may take so much
memory, and so many seconds of processor time for a job; it can write no files, sees none of our environment's
secrets, and comes last wherever somebody else wants to compute. A job that overruns costs its child; the next
one gets a new child. A child ends by itself when our end of its pipe closes.

    frame   | one line of JSON, {..., "blobs": [lengths]} | blob | blob | ...
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

Work = Literal["templates", "tokenizers"]
"""What a child is for: it imports what that needs before its first job, on nobody's time."""

_PACKAGES = Path(__file__).parent.parent.parent  # where the child finds the package that this module is of
_PASSED_ON = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TZ")
_MAX_LINE_BYTES = 64 * 2**20  # of one frame; larger than any body that a server takes
_MAX_BLOB_BYTES = 128 * 2**20
_OVERRUNS = (-signal.SIGPROF, -signal.SIGALRM)  # how the child's own clocks end it

Frame = tuple[dict[str, Any], list[bytes]]


class SandboxOverrun(Exception):
    """The job took more time or memory than it may, or broke its child."""


class SandboxUnavailable(Exception):
    """There is no child for the job, through no fault of the job's."""


class Sandbox:
    """One child at most, started for the first job that needs it. All methods are thread-safe."""

    def __init__(self, work: Work, *, memory_bytes: int, cpu_s: float) -> None:
        """`memory_bytes`: of the child; `cpu_s`: of each job."""
        self._work = work
        self._limits = (str(memory_bytes), str(cpu_s))
        self._cpu_s = cpu_s
        self._lock = threading.Lock()  # one job at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def ask(self, job: Mapping[str, object], *blobs: bytes) -> Frame:
        """Blocks until the job is done. Raises SandboxOverrun or SandboxUnavailable."""
        return self.ask_line(line_of(job, blobs), *blobs)

    def ask_line(self, line: bytes, *blobs: bytes) -> Frame:
        """`ask` for a job that `line_of` has encoded already."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                write_frame(process.stdin, line, blobs)
                return read_frame(process.stdout)
            except (OSError, EOFError, ValueError):
                raise self._bury(process) from None

    def close(self) -> None:
        """End the child, in the middle of a job too; there will be no other. Idempotent."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()  # whoever waits for it now holds the lock
        with self._lock:
            if self._process is not None:
                self._bury(self._process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise SandboxUnavailable("the server is shutting down")
        if self._process is not None and self._process.poll() is not None:
            self._bury(self._process)  # it was ended from outside between two jobs
        if self._process is None:
            try:
                self._process = self._start()
            except OSError as error:
                raise SandboxUnavailable("the process for templates cannot be started") from error
            if self._is_closed:  # since the look above: `close` has ended the one before, and waits for us
                self._bury(self._process)
                raise SandboxUnavailable("the server is shutting down")
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        inherited = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        paths = os.pathsep.join(path for path in sys.path if path)
        ours = {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(  # noqa: S603 - our own module, and nothing of a client's
            [sys.executable, "-B", "-m", "server.text.sandbox_child", self._work, *self._limits],
            cwd=_PACKAGES,
            env={**inherited, **ours},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # signals for the server do not reach it
        )

    def _bury(self, process: subprocess.Popen[bytes]) -> Exception:
        """Clear away a child that is of no use any more. What to tell whoever waited for it."""
        self._process = None
        process.kill()  # changes nothing about the end of one that is ending by itself
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                _close(pipe)
        if self._is_closed:
            return SandboxUnavailable("the server is shutting down")
        if status in _OVERRUNS:
            return SandboxOverrun(f"it takes more than {self._cpu_s:g} seconds")
        return SandboxOverrun("it broke the process that it ran in")


def line_of(head: Mapping[str, object], blobs: Iterable[bytes] = ()) -> bytes:
    """The first line of a frame. Written piece by piece: whoever encodes a large value at once keeps the
    interpreter from all other threads.
    """
    whole = {**head, "blobs": [len(blob) for blob in blobs]}
    return "".join(json.JSONEncoder(separators=(",", ":")).iterencode(whole)).encode("ascii") + b"\n"


def write_frame(file: IO[bytes], line: bytes, blobs: Iterable[bytes]) -> None:
    """Raises OSError."""
    file.write(line)
    for blob in blobs:
        file.write(blob)
    file.flush()


def read_frame(file: IO[bytes]) -> Frame:
    """Raises EOFError at the end of the file, ValueError for what is no frame, OSError."""
    line = file.readline(_MAX_LINE_BYTES)
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    lengths = head.pop("blobs")
    if sum(lengths) > _MAX_BLOB_BYTES:
        raise ValueError("the blobs are too long")
    blobs = [file.read(length) for length in lengths]
    if [len(blob) for blob in blobs] != lengths:
        raise EOFError
    return head, blobs


def _close(pipe: IO[bytes]) -> None:
    """What was not sent is lost with its reader."""
    with contextlib.suppress(OSError):
        pipe.close()
