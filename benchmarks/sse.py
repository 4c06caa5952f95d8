"""Server-sent events out of a byte stream that may be cut anywhere.

The rules are those of the HTML standard (9.2.6), on bytes: a line ends at CR LF, LF or CR, also when CR and
LF come in two reads; a line that starts with a colon is a comment; several data lines are joined with LF; an
unfinished event at the end of the stream is dropped. UTF-8 is safe to cut, because only whole lines are
looked at.
"""

_BOM = b"\xef\xbb\xbf"


class SseParser:
    """Feed it what the socket gave; it returns the data of every event that is now complete."""

    __slots__ = ("_after_cr", "_data", "_rest", "_started")

    def __init__(self) -> None:
        self._rest = bytearray()  # an unfinished line
        self._data: list[bytes] = []
        self._after_cr = False  # the last byte was CR: an LF to come belongs to it
        self._started = False

    def feed(self, chunk: bytes) -> list[bytes]:
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk.startswith(b"\n"):
                chunk = chunk[1:]
        self._rest += chunk
        if not self._started:
            if len(self._rest) < len(_BOM) and _BOM.startswith(self._rest):
                return []  # cannot tell yet
            self._started = True
            if self._rest.startswith(_BOM):
                del self._rest[: len(_BOM)]
        return self._events()

    def _events(self) -> list[bytes]:
        """Take the whole lines off the buffer."""
        text = bytes(self._rest)
        if b"\r" in text:
            self._after_cr = text.endswith(b"\r")
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        self._rest = bytearray(rest)
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
            elif line == b"data":  # a field without a colon has an empty value
                self._data.append(b"")
        return events
