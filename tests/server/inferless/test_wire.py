"""Frames between the server and an app: whole, cut, or of somebody else."""

import asyncio
import json
import socket
import struct
import threading

import pytest

from server.inferless import wire
from server.inferless.schema import AppInput, AppSchema, schema_from_json
from server.inferless.wire import (
    MAX_BYTES,
    Channel,
    Done,
    End,
    Failed,
    FrameTooLarge,
    Gone,
    Infer,
    Loaded,
    Message,
    Output,
    Ready,
    Stop,
    Took,
    WireError,
    decode,
    encode,
    infer_frame,
    read_message,
)

SCHEMA = AppSchema((AppInput("TEXT", "BYTES", (1,), True),), is_streaming=True)
MESSAGES: list[Message] = [
    Infer([1, 2], [{"TEXT": "a\u2028"}, {"TEXT": ["b"]}]),
    Took(1, 2),
    Gone(1),
    Stop(),
    Loaded(SCHEMA.to_json() | {"inputs": []}),
    Ready(),
    Output(1, {"OUT": "\ud800", "N": 0.5, "B": True}),
    End(1),
    End(1, "no", "app"),
    Done(),
    Done("ValueError (app.py:1)"),
    Failed("no"),
]


def reader_of(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


async def test_messages_arrive_as_they_were_sent() -> None:
    reader = reader_of(b"".join(map(encode, MESSAGES)))

    assert [await read_message(reader) for _ in MESSAGES] == MESSAGES
    assert await read_message(reader) is None


@pytest.mark.parametrize("cut", [1, 3, 4, 10])
async def test_frame_that_is_cut_is_the_end(cut: int) -> None:
    assert await read_message(reader_of(encode(Gone(1))[:cut])) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b"{}",
        b'{"kind":"Nobody"}',
        b'{"kind":"Gone"}',
        b'{"kind":"Gone","id":1,"x":2}',
        b'{"kind":[]}',
        b"\xff",
        b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_other_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        decode(body)


async def test_frames_have_a_largest_size() -> None:
    with pytest.raises(WireError):
        await read_message(reader_of(struct.pack(">I", MAX_BYTES + 1)))
    with pytest.raises(FrameTooLarge):
        encode(Output(1, {"OUT": "x" * MAX_BYTES}))


def test_inputs_that_are_json_already_make_the_same_frame() -> None:
    inputs: list[dict[str, object]] = [{"TEXT": "a\u2028"}, {"TEXT": ["b"]}]
    written = [json.dumps(each, separators=(",", ":")).encode("ascii") for each in inputs]

    assert infer_frame([1, 2], written) == encode(Infer([1, 2], inputs))
    with pytest.raises(FrameTooLarge):
        infer_frame([1], [b"1" * MAX_BYTES])


async def test_long_frames_are_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def noting(body: bytes) -> Message:
        threads.append(threading.current_thread())
        return decode(body)

    monkeypatch.setattr(wire, "decode", noting)
    long = Output(1, {"OUT": [0.5, 1, -2e300] * 10_000})
    reader = reader_of(encode(long) + encode(Gone(1)))

    assert [await read_message(reader), await read_message(reader)] == [long, Gone(1)]
    assert [thread is threading.main_thread() for thread in threads] == [False, True]


def test_channel_reads_what_the_server_writes_and_sees_its_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs)
        ours.sendall(encode(Gone(1)) + encode(Stop()) + encode(Stop())[:5])
        ours.shutdown(socket.SHUT_WR)

        assert [channel.receive(), channel.receive(), channel.receive()] == [Gone(1), Stop(), None]


def test_schema_survives_the_way() -> None:
    loaded = decode(encode(Loaded(SCHEMA.to_json()))[4:])

    assert isinstance(loaded, Loaded)
    assert schema_from_json(loaded.schema) == SCHEMA


@pytest.mark.parametrize("value", [{}, {"inputs": 5}, {"inputs": [{}]}, {"inputs": [], "x": 1}], ids=str)
def test_other_schemas_are_refused(value: dict[str, object]) -> None:
    with pytest.raises((TypeError, KeyError)):
        schema_from_json(value)
