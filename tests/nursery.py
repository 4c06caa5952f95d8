"""Servers that need not import: a process that has imported everything once forks one whenever it is told to.

Four of the five seconds that a start takes are Python reading torch and transformers. What is forked is a
process like any other, with a pid, signals and a standard error of its own, and calls what a console script
calls. The server that most end-to-end tests share is started whole, and so are those whose imports matter.
"""

import atexit
import json
import os
import pkgutil
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

_REPOSITORY = Path(__file__).resolve().parents[1]
_MOST_BYTES = 1 << 16  # of the words of one server
_NUMBER = struct.Struct("i")  # a pid, or an exit status


class Offspring:
    """A forked server: as much of `subprocess.Popen` as tests need."""

    def __init__(self, report: socket.socket, stderr: TextIO) -> None:
        """The report gives the pid, and the exit status as soon as there is one."""
        self.stderr = stderr
        self.report = report
        self._status: int | None = None
        self.pid = self._read()  # waits until the imports are made

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        if self._status is None:
            if not select.select([self.report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("motet serve", timeout or 0.0)
            self._status = self._read()
            self.report.close()
        return self._status

    def _read(self) -> int:
        received = self.report.recv(_NUMBER.size)
        assert received, "the nursery has died"
        number: int = _NUMBER.unpack(received)[0]
        return number

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._status

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Nursery:
    """Our end of the process that forks. For one thread: a wish has been read before the next one is sent."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def fork(
        self,
        *words: str,
        entry: str = "server.__main__:main",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Offspring:
        """`motet WORDS`, or what another console script calls, in a process of its own. Of the variables only
        those count that are read later than at an import.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        reading, writing = os.pipe()
        with theirs:
            try:
                wish = json.dumps([dict(environment), [entry, *words]]).encode()
                socket.send_fds(self._control, [wish], [writing, theirs.fileno()])
            finally:
                os.close(writing)
        return Offspring(ours, os.fdopen(reading, encoding="utf-8", errors="replace"))


@contextmanager
def open_nursery(**environment: str) -> Iterator[Nursery]:
    """With these variables. Servers that still run at its end go on."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.nursery", str(theirs.fileno())],
        cwd=_REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MOTET_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    try:
        with ours:
            yield Nursery(ours)
    finally:
        process.wait(30)


# --- The process --------------------------------------------------------------------------------------------


def _fork_until_left(control: socket.socket) -> list[str] | None:
    """Returns in each server, with its entry point and words, and with None when nobody can ask for more."""
    while True:
        message, fds, _, _ = socket.recv_fds(control, _MOST_BYTES, 2)
        if not message:
            return None
        errors, report = fds
        if os.fork() == 0:
            control.close()
            if _is_server(errors, report):
                environment, words = json.loads(message)
                os.environ.update(environment)
                return list(words)
            os._exit(0)
        os.close(errors)
        os.close(report)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # who has seen a server end is over, too


def _is_server(errors: int, report: int) -> bool:
    """Fork once more. The parent, who is not the server, tells how it ends."""
    pid = os.fork()
    if pid == 0:
        os.dup2(errors, sys.stderr.fileno())
        os.close(errors)
        os.close(report)
        return True
    os.close(errors)
    os.write(report, _NUMBER.pack(pid))
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):
        os.write(report, _NUMBER.pack(os.waitstatus_to_exitcode(status)))
    return False


def main() -> None:
    """Ends once in the nursery, and once in each server, with its status."""
    import server.__main__
    import server.assembly
    import server.process  # noqa: F401

    words = _fork_until_left(socket.socket(fileno=int(sys.argv[1])))
    if words is None:
        return
    sys.argv = words
    try:
        status = pkgutil.resolve_name(words[0])()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    # As Python ends, but that it does not take its modules apart: they would first be copied from ours, for a
    # second and more.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
