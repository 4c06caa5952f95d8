"""HTTP/1.0: bodies of unknown length end with the connection (row C16, trap T10)."""

import asyncio
import json

import pytest

from tests.server.api.conftest import CHAT, GENERATE, WHOLE_CHAT
from tests.server.api.raw_http import Connection, ask, post


async def read_to_end(port: int, request: bytes) -> tuple[bytes, bytes]:
    connection = await Connection.open(port)
    await connection.send(request)
    everything = await asyncio.wait_for(connection.reader.read(), 10)
    connection.drop()
    head, _, body = everything.partition(b"\r\n\r\n")
    return head.lower(), body


@pytest.mark.parametrize("route", [CHAT, GENERATE])
async def test_C16_streams_to_old_clients_are_the_same_bytes_without_chunks(
    port: int, route: tuple[str, object]
) -> None:
    """T10: and one word about the connection."""
    named = "X-Request-Id: one"
    head, body = await read_to_end(port, post(*route, named, version="1.0"))

    assert b"transfer-encoding" not in head
    assert b"content-length" not in head
    assert head.count(b"connection:") == 1
    assert b"connection: close" in head
    assert body == (await ask(port, post(*route, named))).body


async def test_C16_whole_answers_to_old_clients_have_their_length(port: int) -> None:
    head, body = await read_to_end(port, post(*WHOLE_CHAT, version="1.0"))

    assert b"content-length: %d" % len(body) in head
    assert json.loads(body)["object"] == "chat.completion"


async def test_heads_asked_for_by_old_clients_have_no_body(port: int) -> None:
    head, body = await read_to_end(port, b"HEAD /health HTTP/1.0\r\n\r\n")

    assert b"200" in head.splitlines()[0]
    assert body == b""
