"""The object that a streaming app's `infer` is given. Runs in the app's process.

It never raises into the app, whatever happened on the other side: an exception there would leave the app's
helper thread writing into a streamer that the next request reads. What nobody reads is thrown away instead.
"""

import threading
from collections.abc import Iterator

from server.inferless.outputs import OutputError, flat_values
from server.inferless.wire import WINDOW, Channel, End, FrameTooLarge, Output


class Settled:
    """What the handler's methods return: nothing, and apps with `async def infer` can await it."""

    def __await__(self) -> Iterator[None]:
        return iter(())


_SETTLED = Settled()


class StreamHandler:
    """One request's way out. Its methods may be called from any thread."""

    def __init__(self, run_id: int, channel: Channel) -> None:
        self._id = run_id
        self._channel = channel
        self._changed = threading.Condition()
        self._room = WINDOW  # outputs that may be sent before the server has taken some
        self._is_over = False  # what is sent from now on is thrown away
        self._has_ended = False  # the server knows that nothing follows
        self._names: frozenset[str] | None = None  # of the first output

    def send_streamed_output(self, output: object) -> Settled:
        """Send one output; blocks while the reader is WINDOW outputs behind. All must have the same names."""
        try:
            values = flat_values(output)
        except OutputError as error:
            self.end(str(error), "output")
            return _SETTLED
        with self._changed:
            self._changed.wait_for(lambda: self._room > 0 or self._is_over)
            if self._is_over:
                return _SETTLED
            names = frozenset(values)
            if self._names is None:
                self._names = names
            if names == self._names:
                self._room -= 1
                self._send(values)
                return _SETTLED
        expected, got = (", ".join(sorted(some)) or "nothing" for some in (self._names, names))
        self.end(f"the outputs of a stream must have the same names: {expected}, then {got}", "output")
        return _SETTLED

    def finalise_streamed_output(self) -> Settled:
        """The answer is complete. What follows is thrown away, also a second call."""
        self.end()
        return _SETTLED

    finalize_streamed_output = finalise_streamed_output

    def end(self, error: str | None = None, blame: str | None = None) -> None:
        """Close the answer, unless that has been done."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
            if not self._has_ended:
                self._has_ended = True
                self._channel.send(End(self._id, error, blame))

    def took(self, count: int) -> None:
        """The server has taken so many outputs."""
        with self._changed:
            self._room += count
            self._changed.notify_all()

    def gone(self) -> None:
        """Nobody reads any more."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _send(self, values: dict[str, object]) -> None:
        try:
            self._channel.send(Output(self._id, values))
        except FrameTooLarge as error:
            self.end(f"an output is too large: {error}", "output")
