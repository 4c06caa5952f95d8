"""The way out of one streamed answer, between sse-starlette and the HTTP server.

Three things that the layers on either side do not do: it says whether the last write had to wait for the
client (the transport was above its high-water mark), it gives up on a client that does not read for
`send_timeout_s`, and it writes a comment after `keep_alive_s` without a write, so that no proxy between takes
silence for death. Writes are whole events and one at a time, so a comment never lands inside one.
"""

import asyncio
from collections.abc import Generator
from typing import Any

from starlette.types import Message

from server.api.http import Exchange


class ClientStalled(Exception):
    """The client has not read for longer than it may."""


class Outlet:
    """Sends the ASGI messages of one answer."""

    def __init__(self, exchange: Exchange, *, keep_alive_s: float, send_timeout_s: float) -> None:
        self._send = exchange.send
        self._send_body = exchange.send_body
        self._write_now = exchange.write_now
        self._keep_alive_s = keep_alive_s
        self._send_timeout_s = send_timeout_s
        self._waiting = asyncio.Lock()  # held while a write waits for the client
        self._begun: _Rest | None = None  # a write of `send_now` that is to be settled
        self._time = asyncio.get_running_loop().time
        self._last_write = self._time()
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

    @property
    def is_waiting(self) -> bool:
        """Whether a write waits for the client: nothing may be written before it is through."""
        return self._waiting.locked() or self._begun is not None

    def send_now(self, frame: bytes) -> bool:
        """Write a frame of the body while nothing waits. False: it waits now, and `settle` must be awaited.

        Raises: ClientStalled.
        """
        if self._has_stalled:
            raise ClientStalled
        if self._write_now(frame):
            self.is_blocked = False
            self._last_write = self._time()
            return True
        self._begun = self._begin({"type": "http.response.body", "body": frame, "more_body": True})
        return self._begun is None

    async def settle(self) -> None:
        """Until nothing waits for the client. Raises: ClientStalled."""
        begun, self._begun = self._begun, None
        if begun is None:
            await self._turn()
        else:
            await self._end(begun)

    async def keep_alive(self, comment: bytes) -> None:
        """Write comments into silence; ends with the answer."""
        while True:
            await asyncio.sleep(self._last_write + self._keep_alive_s - self._time())
            if self.is_waiting:
                await self._turn()
            if self._has_ended:
                return
            if self._time() - self._last_write < self._keep_alive_s:
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
        begun = self._begin(message)
        if begun is not None:
            await self._end(begun)

    def _begin(self, message: Message) -> "_Rest | None":
        """The first step of a write is taken by hand: if it ends there, as it nearly always does, the
        transport took everything at once, and neither a task nor a timer is needed. Else what is left of it.
        """
        steps = self._send(message).__await__()
        try:
            awaited = next(steps)
        except StopIteration:
            self.is_blocked = False
            self._last_write = self._time()
            return None
        self.is_blocked = True
        return _Rest(steps, awaited)

    async def _end(self, rest: "_Rest") -> None:
        try:
            async with self._waiting, asyncio.timeout(self._send_timeout_s):
                await rest
        except TimeoutError:
            raise ClientStalled from None
        self._last_write = self._time()


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
