"""Between the engine's pace and a reader's: the pending events of one request.

The event loop puts events in and never waits; the reader takes everything that is pending at once. So a
slow reader gets fewer and larger batches, memory is bounded by the answer, and nobody else notices. A reader
either waits, or is called: that needs no task, and is how nearly all tokens leave.

`TokenStream` is what a protocol holds. It owns nothing but the right to read and to stop: if it is dropped
without `close()`, its request is ended all the same.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Self

from server.types import TokenEvent


class Listeners:
    """Those that the event loop is to call soon, in one go: with a call of its own for each of them it would
    take twice as long.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def call_soon(self, listener: Callable[[], None]) -> None:
        """After those that wait already. One that raises costs the others a turn of the event loop."""
        self._waiting.append(listener)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._call)

    def _call(self) -> None:
        try:
            for _ in range(len(self._waiting)):
                self._waiting.popleft()()
        finally:
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._call)


class Outbox:
    """Events on their way to one reader. Used on the event loop alone."""

    __slots__ = ("_events", "_is_called", "_is_closed", "_is_complete", "_listener", "_listeners", "_waiter")

    def __init__(self, listeners: Listeners) -> None:
        """`listeners`: of all outboxes that are filled together."""
        self._listeners = listeners
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._listener: Callable[[], None] | None = None
        self._is_called = False  # it will be, soon
        self._is_complete = False  # nothing more will be put
        self._is_closed = False  # nobody will read

    @property
    def num_pending(self) -> int:
        return len(self._events)

    def put(self, event: TokenEvent) -> None:
        """Add an event and wake the reader, once for all events that are put before it runs."""
        if self._is_closed:
            return
        self._events.append(event)
        self._wake()

    def complete(self) -> None:
        """Every choice has its finish: the reader ends after what is pending."""
        self._is_complete = True
        self._wake()

    def close(self) -> None:
        """Nobody reads any more: forget what is pending, and end a read that is under way."""
        self._is_closed = True
        self._events.clear()
        self._wake()

    @property
    def is_over(self) -> bool:
        """Nothing will come any more after what is pending."""
        return self._is_complete or self._is_closed

    def take(self) -> tuple[TokenEvent, ...]:
        """Everything that is pending, which may be nothing."""
        events = tuple(self._events)
        self._events.clear()
        return events

    def listen(self, listener: Callable[[], None] | None) -> None:
        """See `TokenStream.listen`."""
        self._listener = listener
        if self._events or self.is_over:
            self._wake()

    def wait(self) -> asyncio.Future[None]:
        """Done as soon as there is something, or the end. One reader at a time."""
        assert self._waiter is None or self._waiter.done(), "a stream has one reader"
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _wake(self) -> None:
        if self._listener is not None:
            if not self._is_called:
                self._is_called = True
                self._listeners.call_soon(self._call)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _call(self) -> None:
        self._is_called = False
        if self._listener is not None:
            self._listener()


class TokenStream:
    """What an accepted request yields: batches of events, until every choice's finish was returned."""

    __slots__ = (
        "__weakref__",
        "_is_over",
        "_on_close",
        "_on_drop",
        "_on_pause",
        "_on_read",
        "_on_resume",
        "_outbox",
        "num_prompt",
        "request_id",
    )

    def __init__(
        self,
        request_id: str,
        num_prompt: int,
        outbox: Outbox,
        *,
        on_read: Callable[[], None],
        on_pause: Callable[[], None],
        on_resume: Callable[[], None],
        on_close: Callable[[], None],
        on_drop: Callable[[], None],
    ) -> None:
        """`on_read` follows each batch, `on_close` the first `close`. `on_drop` comes from whatever thread
        collects a stream that was neither read to its end nor closed.
        """
        self.request_id = request_id
        self.num_prompt = num_prompt
        self._outbox = outbox
        self._on_read = on_read
        self._on_pause = on_pause
        self._on_resume = on_resume
        self._on_close = on_close
        self._on_drop = on_drop
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[TokenEvent, ...]:
        """All that is pending, at least one event. StopAsyncIteration after the last finish, or after
        close.
        """
        while not (events := self.take()):
            if self._is_over:
                raise StopAsyncIteration
            await self._outbox.wait()
        return events

    def take(self) -> tuple[TokenEvent, ...] | None:
        """All that is pending, which may be nothing; None at the end."""
        events = self._outbox.take()
        if events:
            self._on_read()
        elif self._outbox.is_over:
            self._is_over = True
            return None
        return events

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Have it called, from the event loop itself, soon after something can be taken or the end has come,
        once for all that comes until then. None: no more. Who listens does not iterate.
        """
        self._outbox.listen(listener)

    def pause(self) -> None:
        """No more tokens until `resume`, and no reader is waited for. What is pending stays. Idempotent."""
        if not self._is_over:
            self._on_pause()

    def resume(self) -> None:
        """Go on after `pause`. Idempotent."""
        if not self._is_over:
            self._on_resume()

    def close(self) -> None:
        """End what still runs. Synchronous and idempotent; after it the stream yields nothing."""
        if not self._is_over:
            self._is_over = True
            self._on_close()

    def __del__(self) -> None:
        if not self._is_over:
            self._on_drop()
