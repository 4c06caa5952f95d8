"""The operating system's side of an app: its process, its socket, and its end."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from server.inferless.wire import Message, WireError, encode, read_message

_PACKAGES = Path(__file__).parent.parent.parent  # where the child finds the package that this module is of
_READ_AHEAD_BYTES = 2**20
_TERM_S = 3.0  # between SIGTERM and SIGKILL


class AppFailed(Exception):
    """The app's process is of no use any more; the message is for the operator."""


class AppProcess:
    """One process in a session of its own, so that signals for the server do not reach it, and ours reach
    everything that it has started.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, folder: Path, environment: Mapping[str, str], output: Path | None) -> Self:
        """`environment` is added to ours; what the app prints is appended to `output`, or thrown away.

        Raises: AppFailed.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                sink = _open_sink(output)
                try:
                    process = await asyncio.create_subprocess_exec(
                        sys.executable,
                        "-B",  # the app's folder stays as it is
                        "-m",
                        "server.inferless.child",
                        str(theirs.fileno()),
                        str(folder),
                        cwd=_PACKAGES,
                        env={**os.environ, **environment},
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=sink,
                        stderr=sink,
                        pass_fds=(theirs.fileno(),),
                        start_new_session=True,
                    )
                finally:
                    os.close(sink)
            except OSError as error:
                ours.close()
                raise AppFailed(f"its process cannot be started: {error}") from error
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_READ_AHEAD_BYTES)
        return cls(process, reader, writer)

    def send(self, message: Message) -> None:
        """Queue a message; one that a dead process does not get is lost, and `receive` will say so.

        Raises: FrameTooLarge.
        """
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Queue a message that is encoded already."""
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def receive(self) -> Message:
        """Raises: AppFailed at the end of the socket, and for what is not our protocol."""
        try:
            message = await read_message(self._reader)
        except WireError as error:
            raise AppFailed(f"its process has sent {error}") from None
        if message is None:
            raise AppFailed("its process has ended")
        return message

    async def stop(self, grace_s: float) -> None:
        """Wait for an end that has been asked for; after `grace_s` seconds SIGTERM, then SIGKILL."""
        discarding = asyncio.create_task(self._discard())
        try:
            if not await self._ends_within(grace_s):
                self._signal(signal.SIGTERM)
                await self._ends_within(_TERM_S)
        finally:
            self.kill()
            discarding.cancel()
            self._writer.close()
            await asyncio.gather(discarding, self._process.wait(), return_exceptions=True)

    def kill(self) -> None:
        """End it at once, with everything that it has started."""
        self._signal(signal.SIGKILL)

    async def _ends_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    async def _discard(self) -> None:
        """Read what is still sent, so that nobody waits for room in the socket."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(_READ_AHEAD_BYTES):
                pass

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _open_sink(output: Path | None) -> int:
    return os.open(output or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
