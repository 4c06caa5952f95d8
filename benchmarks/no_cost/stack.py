"""The real serving stack over a runner that costs nothing, and the engine alone for comparison.

    benchmark's client (process)  ── HTTP ──>  build_app, Service, EngineWorker, EngineCore  ──>  NoCostRunner
    /health asker (process)       ── HTTP ──>
    receiver (process, later)     ── HTTP ──>

Everything between the socket and the runner is what `motet serve` runs; only the model, its tokenizer and the
adapters are replaced.
"""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

import uvicorn

from adapters.errors import AdapterNotFound
from adapters.leases import AdapterLease
from adapters.placement import AdapterPlacement
from adapters.registry import AdapterRegistry
from adapters.types import AdapterInfo, AdapterRef
from benchmarks.bpe import train_tokenizer
from benchmarks.no_cost.runner import NoCostRunner
from benchmarks.prompts import WORDS
from benchmarks.shapes import SHAPES
from server.api.app import build_app
from server.api.state import Phase, ServerState
from server.engine.blocks import BlockPool
from server.engine.card import ModelCard
from server.engine.core import EngineCore
from server.engine.plan import Add, StepOutput
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import SequenceId
from server.engine.service import Service, ServiceLimits
from server.engine.worker import EngineDied, EngineWorker
from server.garbage import collect_seldom
from server.http_server import make_config
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer
from server.types import SamplingParams, StopCriteria

MODEL = "no-cost"
BLOCK_SIZE = 16
STEP_TOKENS = 8192
MAX_MODEL_LEN = 8192
TOKENIZER_CHARACTERS = 1_000_000
BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Size:
    """How many streams of which length."""

    streams: int
    prompt_tokens: int
    output_tokens: int

    @property
    def num_blocks(self) -> int:
        """Room for every stream at its longest: this is not about memory."""
        return 2 * self.streams * ((self.prompt_tokens + self.output_tokens) // BLOCK_SIZE + 2)


class NoAdapters:
    """A registry that never knew anybody."""

    async def acquire(
        self, name: str, *, source: str | None = None, token: str | None = None
    ) -> AdapterLease:
        raise AdapterNotFound(f"there is no adapter {name!r}")

    def list(self) -> tuple[AdapterInfo, ...]:
        return ()

    def get(self, name: str) -> AdapterInfo | None:
        return None


def make_tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(SHAPES["tiny"], TOKENIZER_CHARACTERS))


def make_runner(tokenizer: Tokenizer, step_s: float) -> NoCostRunner:
    """Its tokens are common words and pieces of them, as long as a model's are."""
    return NoCostRunner(tokenizer.encode(" " + " ".join(WORDS[:200])), step_s)


def make_worker(runner: NoCostRunner, size: Size) -> EngineWorker:
    scheduler = Scheduler(
        BlockPool(size.num_blocks, BLOCK_SIZE),
        AdapterPlacement(0),
        _size_of_nothing,
        SchedulerLimits(max_num_seqs=size.streams, max_num_batched_tokens=STEP_TOKENS),
        time.monotonic,
    )
    return EngineWorker(EngineCore(scheduler, runner, time.monotonic, frozenset(), MAX_MODEL_LEN))


def _size_of_nothing(ref: AdapterRef) -> int:
    raise AssertionError(f"nobody could have asked for {ref.name}")


def run_alone(runner: NoCostRunner, size: Size) -> None:
    """The engine thread with nobody behind it: its outputs are thrown away on the spot."""
    worker = make_worker(runner, size)
    ended = threading.Event()
    num_living = size.streams

    def deliver(news: StepOutput | EngineDied) -> None:
        nonlocal num_living
        if isinstance(news, EngineDied):
            ended.set()
            return
        num_living -= sum(output.finish is not None for output in news.outputs)
        worker.acknowledge()
        if not num_living:
            ended.set()

    stop = StopCriteria(max_tokens=size.output_tokens, ignore_eos=True)
    for number in range(size.streams):
        prompt = tuple((number * 7 + i) % 500 for i in range(size.prompt_tokens))
        worker.put(Add(SequenceId(number), prompt, SamplingParams(temperature=0.0), stop, 0, None))
    worker.start(deliver)
    ended.wait()
    worker.stop()


@asynccontextmanager
async def serving(runner: NoCostRunner, tokenizer: Tokenizer, size: Size) -> AsyncIterator[int]:
    """The whole stack on a free port of this machine; yields the port."""
    with ThreadPoolExecutor(2) as pool, socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        service = Service(
            card=_card(tokenizer.vocab_size),
            tokenizer=tokenizer,
            registry=cast(AdapterRegistry, NoAdapters()),
            pool=pool,
            worker=make_worker(runner, size),
            metrics=(metrics := Metrics(MODEL, block_size=BLOCK_SIZE, max_lora=1, is_accelerated=False)),
            limits=ServiceLimits(max_num_seqs=size.streams, max_queued_requests=2 * size.streams),
        )
        service.start()
        collect_seldom()
        state = ServerState(service=service, metrics=metrics, phase=Phase.READY)
        config = make_config(build_app(state), backlog=BACKLOG)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task
            await service.stop()


def _card(vocab_size: int) -> ModelCard:
    return ModelCard(
        id=MODEL,
        served_names=(MODEL,),
        max_model_len=MAX_MODEL_LEN,
        created=int(time.time()),
        dtype="float32",
        device="cpu",
        compute_type="cpu",
        fingerprint=MODEL,
        vocab_size=vocab_size,
    )
