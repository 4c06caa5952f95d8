"""The routes over the real service, engine thread and core; only the arithmetic and the adapters are fake.

Z9 is asked here in full: after a client has left, in any phase, no block and no adapter is held any more.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from adapters.errors import AdapterNotFound, AdapterUnavailable
from adapters.types import AdapterInfo
from server.api.app import build_app
from server.api.state import ApiOptions, Phase, ServerState
from server.engine.card import ModelCard
from server.engine.service import Service, ServiceLimits
from server.engine.worker import EngineWorker
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer
from tests import made_tokenizers
from tests.fakes import Rig, make_rig
from tests.fakes import adapter as ref_of
from tests.server.api.conftest import serve
from tests.server.api.fake_service import FakeLease
from tests.server.api.raw_http import Connection, ask, post, until

CARD = ModelCard("base", ("base",), 500, 1764000000, "float32", "cpu", "cpu", "fp", vocab_size=0x110000)
HELLO = [{"role": "user", "content": "Hi"}]
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HELLO, "stream": True, "max_tokens": 12, "ignore_eos": True}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 12, "n": 2, "ignore_eos": True}),
    ("/v1/completions", {"prompt": "Hi", "stream": True, "max_tokens": 12, "ignore_eos": True}),
    ("/generate", {"inputs": "Hi", "parameters": {"max_new_tokens": 12, "ignore_eos_token": True}}),
    ("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 12, "ignore_eos_token": True}}),
]
ENDLESS = 400
OPTIONS = ApiOptions()


class PlainTemplate:
    """Stands in for the model's chat template."""

    def render(self, messages: Sequence[dict[str, object]], **options: object) -> str:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


TOKENIZER = Tokenizer(made_tokenizers.byte_level(), cast(Any, PlainTemplate()))
INVOCATION = " the cat"


class Registry:
    """Two adapters, one with an invocation, one that is never ready, and the count of what is held."""

    def __init__(self) -> None:
        self.leases: list[FakeLease] = []

    async def acquire(self, name: str, *, source: str | None = None, token: str | None = None) -> FakeLease:
        if name == "late":
            raise AdapterUnavailable("adapter 'late' is still loading", retry_after_s=3)
        if name not in ("a", "b", "invoked"):
            raise AdapterNotFound(f"there is no adapter {name!r}")
        lease = FakeLease(ref_of(name))
        if name == "invoked":
            lease.invocation_tokens = tuple(TOKENIZER.encode(INVOCATION, add_special_tokens=False))
        self.leases.append(lease)
        return lease

    def get(self, name: str) -> AdapterInfo | None:
        return None


class House:
    def __init__(self, port: int, rig: Rig, service: Service, registry: Registry, state: ServerState) -> None:
        self.port = port
        self.rig = rig
        self.service = service
        self.registry = registry
        self.state = state

    async def everything_is_free(self) -> None:
        await until(lambda: self.service._idle.is_set() and self.state.num_active == 0)
        self.rig.scheduler.check()
        self.rig.assert_nothing_held()
        assert all(lease.num_released == 1 for lease in self.registry.leases)


@asynccontextmanager
async def house(
    *, max_queued: int = 100, options: ApiOptions = OPTIONS, **knobs: Any
) -> AsyncIterator[House]:
    usual: dict[str, Any] = {"clock": time.monotonic, "sizes": 10, "num_blocks": 1024}
    rig = make_rig(**(usual | knobs))
    registry = Registry()
    with ThreadPoolExecutor(1) as pool:
        service = Service(
            card=CARD,
            tokenizer=TOKENIZER,
            registry=cast(Any, registry),
            pool=pool,
            worker=EngineWorker(rig.core),
            metrics=Metrics("base", block_size=4, max_lora=4, is_accelerated=False),
            limits=ServiceLimits(max_num_seqs=8, max_queued_requests=max_queued),
        )
        service.start()
        state = ServerState(options=options, service=service, phase=Phase.READY)
        try:
            async with serve(build_app(state)) as port:
                yield House(port, rig, service, registry, state)
        finally:
            await service.stop()


def named(body: dict[str, Any], name: str) -> dict[str, Any]:
    """The same request for an adapter."""
    if "inputs" in body:
        return {**body, "parameters": {**body["parameters"], "adapter_id": name}}
    return {**body, "model": name}


def text_of(body: bytes) -> str:
    """The whole answer, whatever the route."""
    if not body.startswith(b"data: "):
        whole = json.loads(body)
        if "choices" not in whole:
            return str(whole["generated_text"])
        choice = whole["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])
    frames = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    return next(str(frame["generated_text"]) for frame in frames if frame.get("generated_text") is not None)


async def test_all_routes_answer_at_once_for_base_and_adapters() -> None:
    """L11: eight requests and more in one batch say what each says alone."""
    async with house() as h:
        wanted = [(path, named(body, name)) for path, body in ROUTES for name in ("base", "a", "b")]
        alone = [text_of((await ask(h.port, post(*each))).body) for each in wanted]
        together = await asyncio.gather(*(ask(h.port, post(*each)) for each in wanted))

        assert [answer.status for answer in together] == [200] * len(wanted)
        assert [text_of(answer.body) for answer in together] == alone
        assert len(set(alone)) > 3
        await h.everything_is_free()


def with_set(body: dict[str, Any], *parts: tuple[str, float]) -> dict[str, Any]:
    """The same request for several adapters at once."""
    lora = [{"name": name, "scale": scale} for name, scale in parts]
    if "inputs" in body:
        return {**body, "parameters": {**body["parameters"], "lora": lora}}
    return {**body, "lora": lora}


async def test_sets_answer_beside_others_what_they_answer_alone() -> None:
    """In one batch with single adapters and the base; the order of a set does not matter, its scales do."""
    sets: tuple[list[tuple[str, float]], ...] = (
        [("a", 0.5), ("b", 2)],
        [("b", 2), ("a", 0.5)],
        [("a", 0.5)],
        [("a", 0.5), ("b", 1)],
        [("b", 1)],
        [],
    )
    async with house() as h:
        wanted = [(path, with_set(body, *parts)) for path, body in ROUTES for parts in sets]
        wanted += [(path, named(body, name)) for path, body in ROUTES for name in ("a", "b", "base")]
        alone = [text_of((await ask(h.port, post(*each))).body) for each in wanted]
        together = await asyncio.gather(*(ask(h.port, post(*each)) for each in wanted))

        assert [text_of(answer.body) for answer in together] == alone
        for first, turned, *others in (alone[i : i + 6] for i in range(0, 30, 6)):
            assert first == turned
            assert first not in others
        of_b, of_base = [alone[i] for i in range(31, 45, 3)], [alone[i] for i in range(32, 45, 3)]
        assert [alone[i] for i in range(4, 30, 6)] == of_b, "one adapter as it is"
        assert [alone[i] for i in range(5, 30, 6)] == of_base, "none"
        assert together[0].header("x-adapter-id") == "a:0.5+b:2"
        await h.everything_is_free()


async def test_Z9_clients_that_leave_free_all_adapters_of_their_sets() -> None:
    async with house(arena_bytes=20) as h:
        connections = [await Connection.open(h.port) for _ in range(10)]
        for i, connection in enumerate(connections):
            path, body = ROUTES[i % len(ROUTES)]
            await connection.send(post(path, with_set(body, ("a", 0.5 + i), ("b", 2))))
        for connection in connections:
            connection.drop()
            await asyncio.sleep(0)
        await h.everything_is_free()
        assert len(h.registry.leases) >= 2


async def test_adapter_with_an_invocation_goes_on_from_what_the_base_model_has_computed() -> None:
    """And without its invocation it answers as the base does, under its own name."""
    talk = "hello" + " hello world" * 20
    async with house() as h:

        async def answer(inputs: str, **parameters: Any) -> tuple[str, int, str | None]:
            usual = {"max_new_tokens": 12, "ignore_eos_token": True}
            body = {"inputs": inputs, "parameters": {**usual, **parameters}}
            got = await ask(h.port, post("/generate", body))
            details = json.loads(got.body)["details"]
            return text_of(got.body), details["cached_tokens"], got.header("x-adapter-id")

        of_base, _, _ = await answer(talk)
        invoked, num_cached, name = await answer(talk + INVOCATION, adapter_id="invoked")
        from_start, num_own, _ = await answer(talk + INVOCATION, adapter_id="a")
        assert num_cached >= len(TOKENIZER.encode(talk)) - 4 > 40 > num_own == 0
        assert name == "invoked"
        assert invoked not in (from_start, (await answer(talk + INVOCATION))[0])
        text, num_cached, name = await answer(talk, adapter_id="invoked")
        assert (text, name) == (of_base, "invoked")
        assert num_cached > 40
        await h.everything_is_free()


async def test_L11_eight_requests_take_as_many_steps_as_one() -> None:
    """Of the base and its adapters, all there before the second step."""
    route = ROUTES[-1]
    names = ["base", "a", "b", "a", "b", "base", "a", "b"]
    async with house() as h:
        await ask(h.port, post(*route))
        num_alone = len(h.rig.runner.log)
        are_there = threading.Event()
        h.rig.runner.interrupt = lambda point: None if are_there.wait(10) else pytest.fail("too late")
        asking = [asyncio.create_task(ask(h.port, post(route[0], named(route[1], name)))) for name in names]
        await until(lambda: len(h.service._live) == len(names))
        are_there.set()
        answers = [await each for each in asking]
        num_together = len(h.rig.runner.log) - num_alone

        assert [answer.status for answer in answers] == [200] * len(names)
        assert 12 <= num_alone <= num_together <= num_alone + 4
        await h.everything_is_free()


async def test_prompts_are_scored_and_pooled_beside_others_for_base_and_adapters() -> None:
    """Lists of prompts, echo and vectors in one batch with streams, as each says alone."""
    prompts = ["Hi", "Hello there", [70, 71, 72], "x" * 150]
    questions: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"input": "x" * 150}),
        ("/v1/embeddings", {"input": ["Hi", "Hello there", "x" * 150], "pooling": "last"}),
        ("/v1/completions", {"prompt": ["Hi", "Hello there"], "n": 2, "echo": True, "logprobs": 2}),
        *(
            ("/v1/completions", {"prompt": one, "echo": True, "logprobs": 1, "max_tokens": 0})
            for one in prompts
        ),
    ]
    async with house() as h:
        wanted = [(path, named(body, name)) for path, body in questions for name in ("base", "a", "b")]
        alone = [json.loads((await ask(h.port, post(*each))).body) for each in wanted]
        together = await asyncio.gather(
            *(ask(h.port, post(*each)) for each in (*wanted, *((p, named(b, "a")) for p, b in ROUTES)))
        )
        answers = [json.loads(answer.body) for answer in together[: len(wanted)]]

        assert {answer.status for answer in together} == {200}
        assert [told(answer) for answer in answers] == [told(answer) for answer in alone]
        assert len({json.dumps(told(answer)) for answer in alone}) > 2 * len(questions), "adapters matter"
        await h.everything_is_free()


def told(answer: dict[str, Any]) -> list[object]:
    """What a request says however often it is asked."""
    if "data" in answer:
        return [entry["embedding"] for entry in answer["data"]]
    return [(choice["text"], choice["logprobs"]) for choice in answer["choices"]]


@pytest.mark.parametrize(
    "body", [{"echo": True, "logprobs": 1}, {"echo": True, "logprobs": 1, "max_tokens": 0}]
)
async def test_Z9_clients_that_leave_while_prompts_are_scored_free_everything(body: dict[str, Any]) -> None:
    async with house() as h:
        connections = [await Connection.open(h.port) for _ in range(6)]
        for i, connection in enumerate(connections):
            path, more = ("/v1/embeddings", {"input": ["x" * 400] * 9})
            if i % 2:
                path, more = "/v1/completions", {"prompt": ["x" * 400] * 9, **body}
            await connection.send(post(path, named(more, "a")))
        for connection in connections:
            connection.drop()
            await asyncio.sleep(0)
        await h.everything_is_free()


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_headers_and_counts_come_from_the_engine(path: str, body: dict[str, Any]) -> None:
    async with house() as h:
        answer = await ask(h.port, post(path, named(body, "a")))

        assert (answer.header("x-adapter-id"), answer.header("x-model-id")) == ("a", "base")
        assert int(answer.header("x-prompt-tokens") or 0) > 1
        if answer.header("x-generated-tokens") is not None:
            assert int(answer.header("x-generated-tokens") or 0) == 12 * body.get("n", 1)
        await h.everything_is_free()


def endless(path: str, body: dict[str, Any]) -> bytes:
    if "inputs" in body:
        body = {**body, "parameters": {**body["parameters"], "max_new_tokens": ENDLESS}}
    else:
        body = {**body, "max_tokens": ENDLESS}
    return post(path, named(body, "a"))


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_Z9_clients_that_leave_free_blocks_and_adapters(path: str, body: dict[str, Any]) -> None:
    """Ten clients, of which more than can run wait in the queue; each leaves at another moment."""
    async with house() as h:
        connections = [await Connection.open(h.port) for _ in range(10)]
        for connection in connections:
            await connection.send(endless(path, body))
        for connection in connections:
            connection.drop()
            await asyncio.sleep(0)
        await h.everything_is_free()

        assert (await ask(h.port, post(path, body))).status == 200
        await h.everything_is_free()


async def test_full_queue_and_unready_adapters_hold_nothing() -> None:
    async with house(max_queued=0) as h:
        too_many = post("/v1/completions", {"prompt": "Hi", "n": 20, "model": "a"})
        full = await ask(h.port, too_many)
        late = await ask(h.port, post("/generate", {"inputs": "Hi", "parameters": {"adapter_id": "late"}}))
        unknown = await ask(h.port, post("/v1/completions", {"prompt": "Hi", "model": "../../etc/passwd"}))

        assert (full.status, late.status, unknown.status) == (429, 503, 404)
        assert full.header("retry-after")
        assert late.header("retry-after") == "3"
        await h.everything_is_free()


async def test_requests_are_refused_while_draining_and_running_ones_get_their_end() -> None:
    async with house() as h:
        connection = await Connection.open(h.port)
        await connection.send(endless(*ROUTES[0]))
        await connection.read_head()
        h.state.phase = Phase.DRAINING
        await h.service.drain(0)
        refused = await ask(h.port, post(*ROUTES[0]))
        frames = []
        while chunk := await connection.read_chunk():
            frames.append(chunk)

        assert refused.status == 503
        assert refused.header("retry-after")
        assert frames[-1] == b"data: [DONE]\n\n"
        assert b"shutting down" in frames[-2] or b'"finish_reason":"length"' in frames[-2]
        connection.drop()
        await h.everything_is_free()
