"""`DELETE /v1/adapters/{id}` while requests run: who is refused, who goes on, who is ended, what is freed.

Over the real service, engine thread and core; only the arithmetic and the adapters' files are fake.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from adapters.types import AdapterInfo, AdapterRef, AdapterStatus, Unloaded
from tests.fakes import adapter as ref_of
from tests.server.api.fake_service import FakeLease
from tests.server.api.raw_http import Connection, RawAnswer, ask, get, post, until
from tests.server.api.test_real_service import ENDLESS, HELLO, House, Registry, house, named

PATIENCE_S = 30  # for what must come; a test that needs it has failed


class NamedRegistry(Registry):
    """The names "a" and "twin" for one revision, and "b"; each has 10 bytes, which go with the last lease."""

    def __init__(self) -> None:
        super().__init__()
        refs = {"a": ref_of("a"), "b": ref_of("b"), "twin": AdapterRef("twin", ref_of("a").revision)}
        self.infos = {
            name: AdapterInfo(ref, f"/adapters/{name}", "local", 8, ("q_proj",), 10, 0)
            for name, ref in refs.items()
        }
        self.holding: asyncio.Event | None = None  # leases are given out when it is set

    async def acquire(self, name: str) -> FakeLease:
        info = self.infos.get(name)
        if info is None:
            return await super().acquire("unknown")
        lease = FakeLease(info.ref)
        self.leases.append(lease)
        if self.holding is not None:
            await self.holding.wait()
        return lease

    def get(self, name: str) -> AdapterInfo | None:
        return self.infos.get(name)

    def status(self, name: str) -> AdapterStatus | None:
        info = self.infos.get(name)
        return None if info is None else AdapterStatus(info, True, False, 0, None, 1, 0.1)

    def list(self) -> tuple[AdapterInfo, ...]:
        return tuple(self.infos.values())

    def is_loaded(self, ref: AdapterRef) -> bool:
        is_meant = any(info.ref.revision == ref.revision for info in self.infos.values())
        return is_meant or self._num_leases(ref) > 0

    async def unload(self, name: str, *, force: bool = False) -> Unloaded | None:
        info = self.infos.pop(name, None)
        if info is None:
            return None
        num_bytes = 0 if self.is_loaded(info.ref) else info.num_bytes
        return Unloaded(name, info.revision, num_bytes, self._num_leases(info.ref))

    def _num_leases(self, ref: AdapterRef) -> int:
        return sum(lease.ref.revision == ref.revision and not lease.num_released for lease in self.leases)


class Scene:
    """A server whose engine does a few steps with as many sequences as wanted, and more when `is_open`."""

    def __init__(self, h: House, registry: NamedRegistry) -> None:
        self.h = h
        self.registry = registry
        self.is_open = threading.Event()
        self.num_wanted = 1
        self.connections: list[Connection] = []

    async def stream(self, path: str, body: dict[str, Any]) -> Connection:
        """A request that has got its first frame."""
        connection = await Connection.open(self.h.port)
        self.connections.append(connection)
        await connection.send(post(path, body))
        assert (await connection.read_head()).status == 200
        await connection.read_chunk()
        return connection

    async def remove(self, name: str, query: str = "") -> dict[str, Any]:
        answer = await ask(self.h.port, get(f"/v1/adapters/{name}{query}", method="DELETE"))
        assert answer.status == 200, answer.body
        return dict(json.loads(answer.body))


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    async with house() as h:
        registry = NamedRegistry()
        h.registry = h.service.registry = cast(Any, registry)
        made = Scene(h, registry)
        steps = 0

        def interrupt(point: str) -> None:
            nonlocal steps
            steps += point == "start" and len(h.service._live) >= made.num_wanted
            assert steps <= 3 or made.is_open.wait(PATIENCE_S)

        h.rig.runner.interrupt = interrupt
        try:
            yield made
        finally:
            made.is_open.set()
            for connection in made.connections:
                connection.drop()
        await h.everything_is_free()


async def rest(connection: Connection) -> bytes:
    frames = []
    while chunk := await connection.read_chunk():
        frames.append(chunk)
    return b"".join(frames)


STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HELLO, "stream": True, "max_tokens": ENDLESS, "ignore_eos": True}),
    ("/v1/completions", {"prompt": "Hi", "stream": True, "max_tokens": ENDLESS, "ignore_eos": True}),
    (
        "/generate_stream",
        {"inputs": "Hi", "parameters": {"max_new_tokens": ENDLESS, "ignore_eos_token": True}},
    ),
    ("/v1/messages", {"messages": HELLO, "stream": True, "max_tokens": ENDLESS}),
    ("/v1/responses", {"input": "Hi", "stream": True, "max_output_tokens": ENDLESS}),
    ("/api/generate", {"prompt": "Hi", "options": {"num_predict": ENDLESS}}),
]
ERRORS = {
    "/v1/chat/completions": b'data: {"error":{"message":"adapter \'b\' was removed',
    "/v1/completions": b'data: {"error":{"message":"adapter \'b\' was removed',
    "/generate_stream": b'data: {"error":"adapter \'b\' was removed',
    "/v1/messages": b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"ada',
    "/v1/responses": b"adapter 'b' was removed from the server",
    "/api/generate": b'{"error":"adapter \'b\' was removed',
}


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_force_ends_running_streams_with_an_error_in_their_protocol_s_words(
    path: str, body: dict[str, Any]
) -> None:
    async with scene() as s:
        connection = await s.stream(path, named(body, "b"))
        removing = asyncio.create_task(s.remove("b", "?force=true"))
        said = await rest(connection)
        s.is_open.set()
        removed = await removing

        assert ERRORS[path] in said
        assert (removed["ended"], removed["users"], removed["freed_bytes"]) == (1, 0, 10)


async def test_by_default_streams_go_on_to_their_end_and_new_requests_are_404() -> None:
    path, body = STREAMS[0]
    async with scene() as s:
        connection = await s.stream(path, named(body, "a"))
        removed = await s.remove("a")
        refused = await ask(s.h.port, post(path, named(body, "a")))
        s.is_open.set()
        said = await rest(connection)

        assert (removed["ended"], removed["users"], removed["freed_bytes"]) == (0, 1, 0)
        assert refused.status == 404
        assert b'"finish_reason":"length"' in said
        assert said.endswith(b"data: [DONE]\n\n")


async def test_who_waits_is_told_what_was_freed_when_the_last_one_ended() -> None:
    path, body = STREAMS[0]
    async with scene() as s:
        connection = await s.stream(path, named(body, "a"))
        del s.registry.infos["twin"]
        removing = asyncio.create_task(s.remove("a", "?wait=30"))
        await until(lambda: "a" not in s.registry.infos)
        s.is_open.set()
        said, removed = await rest(connection), await removing

        assert b'"finish_reason":"length"' in said
        assert (removed["ended"], removed["users"], removed["freed_bytes"]) == (0, 0, 10)


async def test_force_waits_first_if_it_is_told_to() -> None:
    path, body = STREAMS[0]
    async with scene() as s:
        connection = await s.stream(path, named(body, "a"))
        removing = asyncio.create_task(s.remove("a", "?force=true&wait=30"))
        await until(lambda: "a" not in s.registry.infos)
        s.is_open.set()
        said, removed = await rest(connection), await removing

        assert b'"finish_reason":"length"' in said
        assert removed["ended"] == 0


async def test_others_go_on_even_with_the_same_content_under_another_name() -> None:
    path, body = STREAMS[0]
    async with scene() as s:
        s.num_wanted = 4
        names = ("twin", "base", "b", "a")
        *others, victim = await asyncio.gather(*(s.stream(path, named(body, name)) for name in names))
        removing = asyncio.create_task(s.remove("a", "?force=true"))
        ended = await rest(victim)
        s.is_open.set()
        removed = await removing

        assert b"was removed" in ended
        assert removed["freed_bytes"] == 0  # the twin has it
        for connection in others:
            assert b'"finish_reason":"length"' in await rest(connection)


async def test_an_answer_that_is_not_streamed_is_503() -> None:
    path, body = STREAMS[0]
    async with scene() as s:
        asking = asyncio.create_task(ask(s.h.port, post(path, {**named(body, "a"), "stream": False})))
        await until(lambda: len(s.h.service._live) == 1)
        removing = asyncio.create_task(s.remove("a", "?force=true"))
        answer: RawAnswer = await asking
        s.is_open.set()
        await removing

        assert answer.status == 503
        assert json.loads(answer.body)["error"]["message"] == "adapter 'a' was removed from the server"


async def test_a_request_that_comes_late_to_a_removal_by_force_is_refused() -> None:
    """It got the adapter before the removal, and would begin to use it after."""
    path, body = STREAMS[0]
    async with scene() as s:
        s.is_open.set()
        s.registry.holding = asyncio.Event()
        del s.registry.infos["twin"]
        asking = asyncio.create_task(ask(s.h.port, post(path, named(body, "a"))))
        await until(lambda: len(s.registry.leases) == 1)
        removing = asyncio.create_task(s.remove("a", "?force=true"))
        await until(lambda: bool(s.h.service._users._barred))
        s.registry.holding.set()
        answer, removed = await asking, await removing

        assert answer.status == 404
        assert (removed["ended"], removed["users"], removed["freed_bytes"]) == (0, 0, 10)
        assert not s.h.service._users._barred
