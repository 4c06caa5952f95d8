"""nginx in front with its default configuration and with ours, and Caddy with ours: rows C14, C15, C16.

What nginx adds to the first token is measured by `python -m benchmarks.proxy`.
"""

import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from benchmarks.nginx import nginx_in_front_of, nginx_running
from tests.e2e.caddy import caddy_of_deploy
from tests.e2e.running import REPOSITORY, RunningServer
from tests.server.api.conftest import CHAT, WHOLE_CHAT, begin, make_state, manual, port, service, state
from tests.server.api.fake_service import FakeService, finish_of, token_event
from tests.server.api.raw_http import ask, post

__all__ = ["make_state", "manual", "port", "service", "state"]  # fixtures

PATIENCE_S = 60  # nginx's default proxy_read_timeout


@contextmanager
def nginx_of_deploy(upstream: int) -> Iterator[int]:
    """With the configuration of `deploy/`, but for the addresses."""
    text = (REPOSITORY / "deploy/nginx.conf").read_text()
    there = text.replace("server motet:8000;", f"server 127.0.0.1:{upstream};")
    with nginx_running(lambda own: there.replace("listen 80;", f"listen 127.0.0.1:{own};")) as through:
        yield through


@pytest.fixture
async def front(port: int, request: pytest.FixtureRequest) -> AsyncIterator[int]:
    with getattr(request, "param", nginx_in_front_of)(port) as through:
        yield through


@pytest.mark.parametrize("front", [nginx_in_front_of, nginx_of_deploy, caddy_of_deploy], indirect=True)
async def test_C14_tokens_come_one_by_one(front: int, manual: FakeService) -> None:
    """T18. Each is read before the next one exists."""
    connection, stream = await begin(front, manual, CHAT)
    stream.put(token_event("One"))
    head = await connection.read_head()
    assert head.status == 200
    assert head.header("content-type") == "text/event-stream; charset=utf-8"
    assert b'"content":"One"' in await connection.read_chunk()
    for word in (" two", " three"):
        stream.put(token_event(word))
        assert f'"content":"{word}"'.encode() in await connection.read_chunk()
    stream.put(token_event("!", finish=finish_of(stream.request, "One two three!", 4)))
    rest = b""
    while chunk := await connection.read_chunk():
        rest += chunk
    assert rest.endswith(b"data: [DONE]\n\n")
    connection.drop()


@pytest.mark.parametrize("route", [CHAT, WHOLE_CHAT])
async def test_C16_answers_are_the_same_bytes_as_without_it(
    front: int, port: int, route: tuple[str, object]
) -> None:
    request = post(*route, "X-Request-Id: one")
    through, direct = await ask(front, request), await ask(port, request)
    assert (through.status, through.body) == (direct.status, direct.body)
    assert through.header("x-prompt-tokens") == direct.header("x-prompt-tokens")


@pytest.mark.parametrize("front", [nginx_in_front_of, caddy_of_deploy], indirect=True)
async def test_client_that_leaves_the_proxy_is_let_go(front: int, manual: FakeService) -> None:
    connection, stream = await begin(front, manual, CHAT)
    stream.put(token_event("One"))
    await connection.read_head()
    connection.drop()
    await stream.closed.wait()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_C15_ninety_seconds_in_the_queue_are_no_504(launch: Callable[..., RunningServer]) -> None:
    """One sequence at a time, and so many long ones before ours that it waits longer than nginx does."""
    server = launch("--max-num-seqs", "1")
    long = {"prompt": "Motet is", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}
    began = time.monotonic()
    httpx.post(f"{server.url}/v1/completions", json=long, timeout=300).raise_for_status()
    ahead = math.ceil(1.5 * PATIENCE_S / (time.monotonic() - began))
    began = time.monotonic()
    with (
        nginx_in_front_of(int(server.url.rpartition(":")[2])) as through,
        httpx.stream(
            "POST",
            f"{server.url}/v1/completions",
            json={**long, "n": ahead, "stream": True},
            timeout=PATIENCE_S,
        ),
        httpx.stream(
            "POST",
            f"http://127.0.0.1:{through}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "Hi"}], "stream": True},
            timeout=PATIENCE_S / 2,
        ) as answer,
    ):
        lines = list(answer.iter_lines())
        waited = time.monotonic() - began
    assert answer.status_code == 200
    assert waited > PATIENCE_S
    assert lines.count(": keep-alive") >= 2
    assert lines[-2] == "data: [DONE]"
