"""A server of scripted answers: in process for most tests, on a real port where the bytes or the connection
matter.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from server.api.app import build_app
from server.api.replay import Recordings
from server.api.state import ApiOptions, Phase, ServerState
from server.http_server import make_config
from tests.server.api.fake_service import FakeMetrics, FakeService, FakeStream
from tests.server.api.raw_http import Connection, post, until


@pytest.fixture
def service() -> Iterator[FakeService]:
    fake = FakeService()
    yield fake
    fake.pool.shutdown()


@pytest.fixture
def make_state(service: FakeService) -> Callable[..., ServerState]:
    """A state that is ready, with ids and times that can be told in advance."""

    def make(**options: object) -> ServerState:
        numbers, generations = itertools.count(1), itertools.count(1)
        state = ServerState(
            options=ApiOptions(**options),  # type: ignore[arg-type]
            version="1.2.3",
            service=service,
            metrics=FakeMetrics(),
            phase=Phase.READY,
            clock=lambda: 100.0,
            unix_time=lambda: 1764000000,
            unix_time_ns=lambda: 1764000000_123456789,
            new_id=lambda: f"id{next(numbers)}",
        )
        state.recordings = Recordings(state.options.replay, state.clock, lambda: f"gen{next(generations)}")
        return state

    return make


@pytest.fixture
def state(make_state: Callable[..., ServerState]) -> ServerState:
    return make_state()


def connect(app: ASGIApp) -> httpx.AsyncClient:
    """A client without a socket; a whole answer at a time."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


@pytest.fixture
async def client(state: ServerState) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(build_app(state)) as http:
        yield http


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # signals are pytest's


@asynccontextmanager
async def serve(app: ASGIApp, **config: object) -> AsyncIterator[int]:
    """The app on a free port of its own, in this event loop. Yields the port."""
    server = _Server(make_config(app, port=0, date_header=False, timeout_graceful_shutdown=5, **config))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
async def port(state: ServerState) -> AsyncIterator[int]:
    async with serve(build_app(state)) as number:
        yield number


CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True})
WHOLE_CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
GENERATE = ("/generate_stream", {"inputs": "Hi"})


@pytest.fixture
def manual(service: FakeService) -> FakeService:
    """The test says what streams yield, and when."""
    service.is_manual = True
    return service


async def begin(port: int, service: FakeService, route: tuple[str, Any]) -> tuple[Connection, FakeStream]:
    """A request that the service has taken in."""
    connection = await Connection.open(port)
    await connection.send(post(*route))
    return connection, await asyncio.wait_for(service.streams.get(), 10)
