"""Clients that leave, or do not read, are let go in every phase, and nothing of theirs is held.

Rows Z8, Z9, D7, D8, D10.
"""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from server.api.app import build_app
from server.api.state import ServerState
from tests.server.api.conftest import CHAT, GENERATE, WHOLE_CHAT, begin, serve
from tests.server.api.fake_service import FakeService, token_event
from tests.server.api.raw_http import Connection, ask, post, until

MakeState = Callable[..., ServerState]


@pytest.mark.parametrize("route", [CHAT, WHOLE_CHAT, GENERATE, ("/generate", {"inputs": "Hi"})])
async def test_Z9_client_that_leaves_in_the_queue_is_let_go(
    port: int, manual: FakeService, route: tuple[str, Any]
) -> None:
    """D7: head held or answer being collected; nothing is written, so only our listener can notice."""
    connection, stream = await begin(port, manual, route)
    connection.drop()

    await asyncio.wait_for(stream.closed.wait(), 10)
    assert manual.is_idle


@pytest.mark.parametrize("route", [CHAT, GENERATE])
async def test_Z9_client_that_leaves_in_the_stream_is_let_go(
    port: int, manual: FakeService, route: tuple[str, Any]
) -> None:
    connection, stream = await begin(port, manual, route)
    stream.put(token_event("One"))
    await connection.read_head()
    await connection.read_chunk()
    connection.drop()

    await asyncio.wait_for(stream.closed.wait(), 10)
    assert manual.is_idle


async def test_client_that_leaves_after_the_deadline_but_before_a_token_is_let_go(
    make_state: MakeState, manual: FakeService
) -> None:
    async with serve(build_app(make_state(header_deadline_s=0.001))) as port:
        connection, stream = await begin(port, manual, CHAT)
        await connection.read_head()
        connection.drop()
        await asyncio.wait_for(stream.closed.wait(), 10)
    assert manual.is_idle


async def test_client_that_leaves_while_its_adapter_loads_is_let_go(port: int, service: FakeService) -> None:
    service.resolving = asyncio.Event()
    connection = await Connection.open(port)
    await connection.send(post(*CHAT))
    await until(lambda: service.num_resolving == 1)
    connection.drop()
    await until(lambda: service.num_resolving == 0)
    assert service.is_idle
    assert service.requests == []


async def test_client_that_leaves_in_the_middle_of_its_body_is_forgotten(
    port: int, state: ServerState, service: FakeService
) -> None:
    connection = await Connection.open(port)
    await connection.send(post(*CHAT)[:-5])
    connection.drop()

    assert (await ask(port, post(*CHAT))).status == 200
    assert len(service.requests) == 1
    await until(lambda: state.num_active == 0)


async def test_Z8_client_that_stops_reading_is_cut_off(
    make_state: MakeState, manual: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    """More than the kernel's buffers take; the server holds one write and gives up after the timeout."""
    async with serve(build_app(make_state(send_timeout_s=0.05))) as port:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(post(*CHAT))
        stream = await asyncio.wait_for(manual.streams.get(), 10)
        async with asyncio.timeout(20):
            while not stream.is_closed:
                stream.put(token_event("x" * 60_000))
                await asyncio.sleep(0)
        client.close()
    assert "stopped reading" in caplog.text
    assert manual.is_idle


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("route", [CHAT, WHOLE_CHAT])
async def test_request_that_the_http_server_cancels_is_let_go(
    state: ServerState, manual: FakeService, route: tuple[str, Any], num_tokens: int
) -> None:
    """D10: uvicorn cancels what outlasts its graceful time."""
    raw = iter([{"type": "http.request", "body": json.dumps(route[1]).encode(), "more_body": False}])
    sent = asyncio.Event()

    async def receive() -> Any:
        for message in raw:
            return message
        await asyncio.Event().wait()

    async def send(message: object) -> None:
        sent.set()

    scope = {"type": "http", "method": "POST", "path": route[0], "query_string": b"", "headers": []}
    answering = asyncio.ensure_future(build_app(state)(scope, receive, send))
    stream = await asyncio.wait_for(manual.streams.get(), 10)
    if num_tokens and route is CHAT:
        stream.put(token_event("One"))
        await asyncio.wait_for(sent.wait(), 10)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering

    assert stream.is_closed
    assert manual.is_idle
    assert state.num_active == 0
