"""One request at an app, as its reader sees it."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Self

from server.errors import ServeError


class AppRun:
    """Yields the app's outputs in order. Used on the event loop alone, and read by one task.

    A run that is dropped without `close` keeps the app's process waiting for its reader.
    """

    def __init__(
        self,
        run_id: int,
        request_id: str,
        inputs: bytes,
        *,
        on_take: Callable[["AppRun"], None],
        on_close: Callable[["AppRun"], None],
    ) -> None:
        """`on_take` follows each output that is read, `on_close` the first `close` of an unfinished run."""
        self.id = run_id
        self.request_id = request_id
        self.inputs = inputs  # a JSON object
        self.num_outputs = 0  # that the app has sent
        self._on_take = on_take
        self._on_close = on_close
        self._outputs: deque[Mapping[str, object]] = deque()
        self._error: ServeError | None = None
        self._is_over = False  # the app has sent everything, or the run has failed
        self._is_closed = False  # nobody reads
        self._news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def put(self, values: Mapping[str, object]) -> None:
        """An output of the app."""
        self.num_outputs += 1
        if self._is_over or self._is_closed:
            self._on_take(self)  # thrown away: as good as read
            return
        self._outputs.append(values)
        self._news.set()

    def finish(self, error: ServeError | None = None) -> None:
        """Nothing follows. Idempotent: the first end counts."""
        if not self._is_over:
            self._is_over = True
            self._error = error
            self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Mapping[str, object]:
        """The next output. Raises: ServeError, after the outputs before it; StopAsyncIteration at the end."""
        while not self._outputs:
            if self._is_over or self._is_closed:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        values = self._outputs.popleft()
        self._on_take(self)
        return values

    def close(self) -> None:
        """Nobody reads any more. Synchronous and idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._outputs.clear()
        self._news.set()
        if not self._is_over:
            self._on_close(self)
