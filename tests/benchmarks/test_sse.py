from collections.abc import Callable, Iterable

import pytest

from benchmarks.sse import SseParser

STREAMS: dict[str, tuple[bytes, list[bytes]]] = {
    "lf": (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    "cr": (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
    "several data lines are joined": (b"data: a\ndata:\ndata:  b\n\n", [b"a\n\n b"]),
    "only one space is taken off": (b"data:a\n\ndata:  b\n\n", [b"a", b" b"]),
    "comments and other fields": (b": hi\nid: 3\nevent: x\nretry: 5\ndata: a\n: bye\n\n:\n\n", [b"a"]),
    "no data, no event": (b"event: ping\n\nid: 1\n\n\n\ndata: a\n\n", [b"a"]),
    "a field without a colon": (b"data\n\n", [b""]),
    "an unfinished event is dropped": (b"data: a\n\ndata: b\n", [b"a"]),
    "byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
    "utf-8": ("data: \u20ac \U0001f600\u2028x\n\n".encode(), ["\u20ac \U0001f600\u2028x".encode()]),
    "done": (b'data: {"x": "y"}\n\ndata: [DONE]\n\n', [b'{"x": "y"}', b"[DONE]"]),
}

CUTS: dict[str, Callable[[bytes], Iterable[bytes]]] = {
    "whole": lambda stream: [stream],
    "bytewise": lambda stream: [stream[i : i + 1] for i in range(len(stream))],
    "by threes": lambda stream: [stream[i : i + 3] for i in range(0, len(stream), 3)],
    "with empty reads": lambda stream: [
        part for i in range(len(stream)) for part in (stream[i : i + 1], b"")
    ],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", STREAMS)
def test_events_do_not_depend_on_where_the_stream_is_cut(name: str, cut: str) -> None:
    stream, expected = STREAMS[name]
    parser = SseParser()
    assert [event for chunk in CUTS[cut](stream) for event in parser.feed(chunk)] == expected


def test_an_event_is_there_as_soon_as_its_blank_line_is() -> None:
    parser = SseParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]
    assert parser.feed(b"data: b\r\n\r") == [b"b"]  # a lone CR ends a line, whatever follows
    assert parser.feed(b"\ndata: c\n\n") == [b"c"]
