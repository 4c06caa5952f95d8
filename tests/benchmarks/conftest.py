"""A real HTTP server on a real port whose answers are scripted, for the load generator to be pointed at.

The script is chosen by the model or adapter that a request asks for:

    base, ada, bob   4 tokens, usage if asked      mute       4 tokens, never any usage
    busy             429                            broken     2 tokens, then an error event
    cut              2 tokens, then nothing         plain      JSON instead of a stream
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks import roofline
from tests.nursery import Nursery, Offspring

TOKENS = ("Once", " upon", " a", " time")


def event(record: object) -> bytes:
    return b"data: " + json.dumps(record).encode() + b"\n\n"


@dataclass
class ScriptedServer:
    """What it was asked is kept in `bodies`; `is_ready` and `has_models` may be changed by a test."""

    port: int = 0
    is_ready: bool = True
    has_models: bool = True
    has_tokenize: bool = True
    bodies: list[dict[str, object]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)  # Authorization headers seen

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/v1/chat/completions", self.openai, methods=["POST"]),
                Route("/v1/completions", self.openai, methods=["POST"]),
                Route("/generate_stream", self.lorax, methods=["POST"]),
            ]
        )

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self.is_ready else 503)

    async def models(self, request: Request) -> Response:
        if not self.has_models:
            return Response(status_code=404)
        entries = [
            {"id": "base", "parent": None},
            *({"id": name, "parent": "base"} for name in ("ada", "bob")),
        ]
        return JSONResponse({"object": "list", "data": entries})

    async def tokenize(self, request: Request) -> Response:
        """One token a word, two for words that begin with a z, and one in front of them all."""
        if not self.has_tokenize:
            return Response(status_code=404)
        words = (await request.json())["inputs"].split()
        count = 1 + sum(2 if word.startswith("z") else 1 for word in words)
        return JSONResponse([{"id": i} for i in range(count)])

    async def openai(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("authorization", ""))
        if refusal := self.refusal(body["model"]):
            return refusal
        return StreamingResponse(self.openai_events(body), media_type="text/event-stream")

    async def openai_events(self, body: dict[str, object]) -> AsyncIterator[bytes]:
        script, is_chat = body["model"], "messages" in body
        yield b": hello\n\n"
        for token in TOKENS[:2] if script in ("broken", "cut") else TOKENS:
            choice = {"delta": {"content": token}} if is_chat else {"text": token}
            yield event({"choices": [{"index": 0, "finish_reason": None, **choice}]})
            await asyncio.sleep(0)
        if script == "cut":
            return
        if script == "broken":
            yield event({"error": {"message": "out of luck", "code": "engine_error"}})
        else:
            yield event({"choices": [{"index": 0, "finish_reason": "length", "delta": {}}]})
        if body.get("stream_options") and script not in ("mute", "broken"):
            usage = {
                "prompt_tokens": 11,
                "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 3},
            }
            yield event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    async def lorax(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if refusal := self.refusal(body["parameters"].get("adapter_id", "base")):
            return refusal
        return StreamingResponse(self.lorax_events(), media_type="text/event-stream")

    async def lorax_events(self) -> AsyncIterator[bytes]:
        for number, text in enumerate(TOKENS):
            is_last = number == len(TOKENS) - 1
            details = {"finish_reason": "length", "prompt_tokens": 11, "generated_tokens": 4, "seed": None}
            yield event(
                {
                    "token": {
                        "id": number,
                        "text": text,
                        "logprob": -0.5,
                        "special": False,
                        "skipped": False,
                    },
                    "generated_text": "".join(TOKENS) if is_last else None,
                    "details": details if is_last else None,
                }
            )

    def refusal(self, script: object) -> Response | None:
        if script == "busy":
            return JSONResponse({"error": {"message": "the queue is full"}}, status_code=429)
        if script == "plain":
            return JSONResponse({"choices": []})
        return None


@pytest.fixture(scope="session")
def running_server() -> Iterator[ScriptedServer]:
    """One for all tests: starting and stopping it takes longer than a test."""
    scripted = ScriptedServer()
    config = uvicorn.Config(scripted.app(), log_level="critical", ws="none", lifespan="off")
    runner = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # from here on connections are kept, whenever the thread comes to accept them
        scripted.port = listener.getsockname()[1]
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
        thread.start()
        yield scripted
        runner.should_exit = True
        thread.join()


@pytest.fixture
def server(running_server: ScriptedServer) -> ScriptedServer:
    """The running server, as new."""
    running_server.is_ready = running_server.has_models = running_server.has_tokenize = True
    running_server.bodies.clear()
    running_server.keys.clear()
    return running_server


class Forked:
    """A server of the nursery: as much of `asyncio.subprocess.Process` as benchmarks need."""

    def __init__(self, offspring: Offspring, stderr: asyncio.StreamReader) -> None:
        self._offspring = offspring
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(offspring.sentinel, self._note_end)
        self.stderr = stderr
        self.pid = offspring.pid
        self.terminate = offspring.terminate
        self.kill = offspring.kill

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._offspring.sentinel)
        self._offspring.wait()
        self._ended.set()

    @property
    def returncode(self) -> int | None:
        return self._offspring.wait() if self._ended.is_set() else None

    async def wait(self) -> int:
        await self._ended.wait()
        return self._offspring.wait()


@pytest.fixture
def forked_servers(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks' servers come from the nursery."""

    async def fork(*command: str, **options: Any) -> Forked:
        assert command[1:3] == ("-m", "server")
        offspring = nursery.fork(*command[3:])
        stderr = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stderr), offspring.stderr
        )
        return Forked(offspring, stderr)

    monkeypatch.setattr("benchmarks.serving.asyncio.create_subprocess_exec", fork)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """To touch the pages of a gigabyte takes seconds, and how fast memory is read is not tested."""
    monkeypatch.setattr(roofline, "CPU_BUFFER_BYTES", 1 << 24)
