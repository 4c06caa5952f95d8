"""Servers that need not import: they are forked by multiprocessing's fork server, which has.

Four of the five seconds that a start takes are Python reading torch and transformers. What is forked is a
process like any other, with a pid, signals and a standard error of its own, and calls what a console script
calls. The server that most end-to-end tests share is started whole, and so are those whose imports matter.
"""

import os
import pkgutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from types import MappingProxyType
from typing import TextIO

import pytest

_IMPORTED = ("pytest", "tests.nursery", "server.__main__", "server.process", "server.assembly")


class Offspring:
    """A forked server: as much of `subprocess.Popen` as tests need."""

    def __init__(self, process: ForkServerProcess, stderr: TextIO) -> None:
        assert process.pid is not None, "it has been started"
        self.pid = process.pid
        self.stderr = stderr
        self.sentinel = process.sentinel  # readable when it is over
        self.terminate = process.terminate
        self.kill = process.kill
        self._process = process

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired("motet serve", timeout or 0.0)
        return status

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None


class Nursery:
    """Our end of the process that forks, of which each process of pytest has one."""

    def __init__(self) -> None:
        forkserver.set_forkserver_preload(list(_IMPORTED))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("OMP_NUM_THREADS", "MOTET_THREADS"):
                patch.setenv(name, "1")
            forkserver.ensure_running()

    def fork(
        self,
        *words: str,
        entry: str = "server.__main__:main",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Offspring:
        """`motet WORDS`, or what another console script calls, in a process of its own. Of the variables only
        those count that are read later than at an import.
        """
        context = get_context("forkserver")
        said, saying = context.Pipe(duplex=False)
        process = context.Process(target=_live, args=(entry, words, dict(environment), saying), daemon=True)
        with said, saying:
            process.start()
            stderr = os.fdopen(os.dup(said.fileno()), encoding="utf-8", errors="replace")
        return Offspring(process, stderr)


def _live(entry: str, words: tuple[str, ...], environment: dict[str, str], saying: Connection) -> None:
    """The forked process."""
    os.dup2(saying.fileno(), sys.stderr.fileno())
    saying.close()
    os.environ.update(environment)
    sys.argv = [entry, *words]
    sys.exit(pkgutil.resolve_name(entry)())
