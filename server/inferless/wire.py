"""What the server and an app's process say to each other, over one socket.

    frame = length (4 bytes, big-endian), then that many bytes of JSON: {"kind": NAME, ...fields}

        server                                     the app's process
          <─────────────── Loaded, Ready ─────────────
          ──────────────── Infer ────────────────────>
          <─────────────── Output … ──────────────────
          ──────────────── Took … ───────────────────>   room for as many more
          ──────────────── Gone ─────────────────────>   nobody reads on: discard the rest
          <─────────────── End ───────────────────────   the answer is complete
          <─────────────── Done ──────────────────────   `infer` has returned
          <─────────────── Ready ─────────────────────
          ──────────────── Stop ─────────────────────>   or the end of the socket: finalize and exit

Nothing else goes over the socket: what an app prints goes to its stdout, which is not this. Standard library
only, as all that the app's process imports.
"""

import asyncio
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MAX_BYTES = 64 * 2**20  # of one frame: an app may send a film in base64, but not without end
INLINE_BYTES = 2**16  # a longer frame is read where the server's event loop need not wait for it
WINDOW = 16  # outputs of one request that may wait for the server to take them

_LENGTH = struct.Struct(">I")
_READ_BYTES = 2**16


class WireError(Exception):
    """The other side does not speak this protocol."""


class FrameTooLarge(Exception):
    """The message does not fit into a frame; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Infer:
    """Do these requests: one, or as many as the app takes at once."""

    ids: list[int]
    inputs: list[dict[str, object]]


@dataclass(frozen=True, slots=True)
class Took:
    """The server has taken `count` outputs of a request."""

    id: int
    count: int


@dataclass(frozen=True, slots=True)
class Gone:
    """Nobody reads the answer to this request any more."""

    id: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Finalize and exit."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The folder was imported; `schema` is AppSchema as JSON."""

    schema: dict[str, object]


@dataclass(frozen=True, slots=True)
class Ready:
    """The app is initialized and takes its next request."""


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a request, in order."""

    id: int
    values: dict[str, object]


@dataclass(frozen=True, slots=True)
class End:
    """No more outputs of this request. With `error` it failed, and `blame` is input, output or app."""

    id: int
    error: str | None = None
    blame: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """`infer` has returned. With `fault`, it raised: the exception's type and place, for the log."""

    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The app could not be loaded or initialized; its process exits. `error` is for the operator."""

    error: str


Message = Infer | Took | Gone | Stop | Loaded | Ready | Output | End | Done | Failed

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Infer, Took, Gone, Stop, Loaded, Ready, Output, End, Done, Failed)
}


def encode(message: Message) -> bytes:
    """A whole frame. Raises: FrameTooLarge; ValueError for what JSON cannot hold."""
    fields = {"kind": type(message).__name__, **asdict(message)}
    return _frame(json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii"))


def infer_frame(ids: Sequence[int], inputs: Sequence[bytes]) -> bytes:
    """A frame with an Infer whose inputs are JSON already. Raises: FrameTooLarge."""
    numbers = ",".join(map(str, ids)).encode("ascii")
    return _frame(b'{"kind":"Infer","ids":[%b],"inputs":[%b]}' % (numbers, b",".join(inputs)))


def _frame(body: bytes) -> bytes:
    if len(body) > MAX_BYTES:
        raise FrameTooLarge(f"more than {MAX_BYTES // 2**20} MiB in one message")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """What a frame holds. Raises: WireError."""
    # Functions of ours, so that the interpreter lets other threads run between the numbers of a long frame.
    hooks: dict[str, Any] = {} if len(body) <= INLINE_BYTES else {"parse_int": _integer, "parse_float": _real}
    try:
        fields = json.loads(body, **hooks)
        return _KINDS[fields.pop("kind")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"not a message of ours ({type(error).__name__})") from None


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None at the end of the socket, also where that cuts a frame. Raises: WireError."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_BYTES:
            raise WireError("a frame is longer than frames may be")
        body = await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return decode(body) if length <= INLINE_BYTES else await asyncio.to_thread(decode, body)


def _integer(digits: str) -> int:
    return int(digits)


def _real(digits: str) -> float:
    return float(digits)


class Channel:
    """The app's end of the socket. Any thread may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Blocks while the socket is full; silent once the server has gone. Raises: as `encode`."""
        frame = encode(message)
        # Without a server whoever receives sees the end of the socket, and ends the process.
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(frame)

    def receive(self) -> Message | None:
        """The next message; None when the server has gone. Raises: WireError."""
        head = self._read(_LENGTH.size)
        body = b"" if head is None else self._read(_LENGTH.unpack(head)[0])
        return decode(body) if body else None

    def _read(self, count: int) -> bytes | None:
        """Exactly so many bytes, or None."""
        parts: list[bytes] = []
        while count:
            try:
                part = self._connection.recv(min(count, _READ_BYTES))
            except OSError:
                return None
            if not part:
                return None
            parts.append(part)
            count -= len(part)
        return b"".join(parts)
