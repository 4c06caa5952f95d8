"""The way out of one streamed answer, between sse-starlette and the HTTP server.

Three things that the layers on either side do not do: it says whether the last write had to wait for the
client (the transport was above its high-water mark), it gives up on a client that does not read for
`send_timeout_s`, and it writes a comment after `keep_alive_s` without a write, so that no proxy between takes
silence for death. Writes are whole events and one at a time, so a comment never lands inside one.
"""

import asyncio
from collections.abc import Generator
from typing import Any

from starlette.types import Message, Send


class ClientStalled(Exception):
    """The client has not read for longer than it may."""


class Outlet:
    """Sends the ASGI messages of one answer."""

    def __init__(
        self, send_head: Send, send_body: Send, *, keep_alive_s: float, send_timeout_s: float
    ) -> None:
        """Where the answer's first message goes, and where the others do."""
        self._send = send_head
        self._send_body = send_body
        self._keep_alive_s = keep_alive_s
        self._send_timeout_s = send_timeout_s
        self._waiting = asyncio.Lock()  # held while a write waits for the client
        self._last_write = asyncio.get_running_loop().time()
        self._has_ended = False
        self._has_stalled = False
        self.is_blocked = False  # the last write had to wait for the client

    async def send(self, message: Message) -> None:
        """Raises: ClientStalled."""
        if self._waiting.locked():
            await self._turn()
        if self._has_stalled:
            raise ClientStalled
        await self._write(message)
        self._send = self._send_body
        self._has_ended = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def keep_alive(self, comment: bytes) -> None:
        """Write comments into silence; ends with the answer."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._last_write + self._keep_alive_s - loop.time())
            if self._waiting.locked():
                await self._turn()
            if self._has_ended:
                return
            if loop.time() - self._last_write < self._keep_alive_s:
                continue
            try:
                await self._write({"type": "http.response.body", "body": comment, "more_body": True})
            except ClientStalled:
                self._has_stalled = True  # for the next write to raise: nobody awaits this task
                return

    async def _turn(self) -> None:
        """Until nobody waits for the client."""
        async with self._waiting:
            pass

    async def _write(self, message: Message) -> None:
        # The first step of the coroutine is taken by hand: if it ends there, as it nearly always does, the
        # transport took everything at once and no timer is needed.
        steps = self._send(message).__await__()
        try:
            awaited = next(steps)
        except StopIteration:
            self.is_blocked = False
        else:
            self.is_blocked = True
            try:
                async with self._waiting, asyncio.timeout(self._send_timeout_s):
                    await _Rest(steps, awaited)
            except TimeoutError:
                raise ClientStalled from None
        self._last_write = asyncio.get_running_loop().time()


class _Rest:
    """What is left of a coroutine whose first step was taken by hand; that step waits for `awaited`."""

    def __init__(self, steps: Generator[Any, None, Any], awaited: Any) -> None:
        self._steps = steps
        self._awaited = awaited

    def __await__(self) -> Generator[Any, None, None]:
        awaited = self._awaited
        while True:
            try:
                try:
                    yield awaited
                except BaseException as error:  # a cancellation belongs to the coroutine that waits
                    awaited = self._steps.throw(error)
                else:
                    awaited = next(self._steps)
            except StopIteration:
                return
