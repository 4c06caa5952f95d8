"""The stream handler's contract: rows K9 to K12, K14."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from server.inferless.handler import StreamHandler
from server.inferless.outputs import OutputError, flat_values, named_values
from server.inferless.wire import WINDOW, Channel, End, Message, Output


class Array:
    """As numpy's and torch's: no list, but knows how to become one."""

    def __init__(self, value: object) -> None:
        self._value = value

    def tolist(self) -> object:
        return self._value


class Ends:
    """Both ends of a socket, the far one read to the end."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._ours, self._theirs = ours, theirs
        self.far = Channel(theirs)
        self.handler = StreamHandler(7, Channel(ours))

    def sent(self) -> list[Message]:
        """All that was sent. The handler's end is closed by it."""
        self._ours.shutdown(socket.SHUT_WR)
        found: list[Message] = []
        while (message := self.far.receive()) is not None:
            found.append(message)
        return found

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.close()


def test_K12_everything_after_the_first_end_is_thrown_away(ends: Ends) -> None:
    ends.handler.send_streamed_output({"OUT": "a"})
    ends.handler.finalise_streamed_output()
    ends.handler.finalise_streamed_output()
    ends.handler.send_streamed_output({"OUT": "b"})
    ends.handler.end("too late", "app")

    assert ends.sent() == [Output(7, {"OUT": "a"}), End(7)]


def test_K9_names_of_outputs_may_not_change(ends: Ends) -> None:
    ends.handler.send_streamed_output({"OUT": "a"})
    ends.handler.send_streamed_output({"OTHER": "b"})
    ends.handler.send_streamed_output({"OUT": "c"})

    first, last = ends.sent()
    assert first == Output(7, {"OUT": "a"})
    assert isinstance(last, End)
    assert last.blame == "output"
    assert "OUT" in str(last.error)
    assert "OTHER" in str(last.error)


def _kind(value: object) -> str:
    """An id that is the same in every process."""
    return type(value).__name__


@pytest.mark.parametrize(
    "value",
    [{"a": 1}, [{"a": 1}], [[1]], None, object(), float("nan"), b"\xff", Array([[1, 2]])],
    ids=_kind,
)
def test_K10_nested_and_foreign_outputs_end_the_stream_with_an_error(ends: Ends, value: Any) -> None:
    ends.handler.send_streamed_output({"OUT": value})

    (end,) = ends.sent()
    assert isinstance(end, End)
    assert end.blame == "output"
    assert "OUT" in str(end.error)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a", "a"),
        (b"a", "a"),
        (True, True),
        (5, 5),
        (0.5, 0.5),
        (["a"], "a"),
        (("a", "b"), ["a", "b"]),
        ([], []),
        (Array(5), 5),
        (Array([1.5]), 1.5),
        (Array([1, 2]), [1, 2]),
    ],
    ids=_kind,
)
def test_K10_values_and_flat_lists_pass_and_a_list_of_one_is_its_element(value: Any, shown: object) -> None:
    assert flat_values({"OUT": value}) == {"OUT": shown}


@pytest.mark.parametrize("output", [None, "text", [1], {1: "a"}], ids=str)
def test_outputs_are_names_with_values(output: Any) -> None:
    with pytest.raises(OutputError):
        named_values(output)


def test_lists_that_hold_themselves_are_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(OutputError):
        named_values({"OUT": loop})


def blocked_sender(handler: StreamHandler, count: int) -> threading.Thread:
    def send() -> None:
        for number in range(count):
            handler.send_streamed_output({"OUT": number})

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_K16_sender_blocks_after_a_window_and_goes_on_as_outputs_are_taken(ends: Ends) -> None:
    sender = blocked_sender(ends.handler, WINDOW + 2)
    for number in range(WINDOW):
        assert ends.far.receive() == Output(7, {"OUT": number})
    assert sender.is_alive()

    ends.handler.took(1)
    assert ends.far.receive() == Output(7, {"OUT": WINDOW})
    assert sender.is_alive()
    ends.handler.took(1)
    sender.join(10)
    assert not sender.is_alive()


def test_K14_sender_that_waits_is_let_go_when_the_reader_leaves(ends: Ends) -> None:
    sender = blocked_sender(ends.handler, WINDOW + 50)
    for _ in range(WINDOW):
        ends.far.receive()
    ends.handler.gone()
    sender.join(10)

    assert not sender.is_alive()
    assert ends.sent() == []


def test_sends_are_silent_when_the_server_has_gone(ends: Ends) -> None:
    ends.close()

    ends.handler.send_streamed_output({"OUT": "a"})
    ends.handler.finalise_streamed_output()


def test_american_spelling_is_understood(ends: Ends) -> None:
    ends.handler.finalize_streamed_output()

    assert ends.sent() == [End(7)]
