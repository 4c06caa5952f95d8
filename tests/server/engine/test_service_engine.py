"""The service on a real engine thread and a real core; only the arithmetic is fake.

What is asked here is what threads can break: order, freedom of blocks and adapters after every kind of end,
and that nobody waits for ever.
"""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Items
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from adapters.types import AdapterRef
from server.engine.card import ModelCard
from server.engine.sequence import Sequence
from server.engine.service import Service, ServiceLimits
from server.engine.stream import TokenStream
from server.engine.worker import EngineWorker
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer
from server.types import FinishReason, GenerationRequest, Pooling, SamplingParams, StopCriteria, TokenEvent
from tests import made_tokenizers
from tests.fakes import (
    Rig,
    WrongPlan,
    adapter,
    expected_scores,
    expected_tokens,
    expected_vector,
    make_rig,
    run_of,
    used,
)

TOKENIZER = Tokenizer(made_tokenizers.byte_level())
CARD = ModelCard("base", ("base",), 10_000, 0, "float32", "cpu", "cpu", "fp", vocab_size=0x110000)
ADAPTER_BYTES = 10
PATIENCE_S = 30  # for what must come; a test that needs it has failed


class CountedLease:
    def __init__(self) -> None:
        self.extras: object | None = None
        self.releases = 0

    def release(self) -> None:
        self.releases += 1


class House:
    """Service, worker and rig, and every lease that was handed in."""

    def __init__(self, rig: Rig, worker: EngineWorker, service: Service) -> None:
        self.rig = rig
        self.worker = worker
        self.service = service
        self.leases: list[CountedLease] = []

    def submit(
        self,
        prompt: Items[int] = (5, 6, 7),
        *,
        adapter: AdapterRef | None = None,
        max_tokens: int = 8,
        stop: Items[str] = (),
        n: int = 1,
        more_prompts: Items[Items[int]] = (),
        num_prompt_logprobs: int | None = None,
        pooling: Pooling | None = None,
    ) -> TokenStream:
        lease = None if adapter is None else CountedLease()
        criteria = StopCriteria(max_tokens=max_tokens, stop=tuple(stop), ignore_eos=True)
        prompts = tuple(tuple(one) for one in (prompt, *more_prompts))
        sampling = SamplingParams(seed=1, num_prompt_logprobs=num_prompt_logprobs)
        request = GenerationRequest(
            "r", prompts, sampling, criteria, used(adapter), n, received=time.monotonic(), pooling=pooling
        )
        stream = self.service.submit(request, lease)
        if lease is not None:
            self.leases.append(lease)
        return stream

    async def assert_all_free(self) -> None:
        """Once the engine has confirmed everything, nothing is held anywhere."""
        await asyncio.wait_for(self.service.drain(PATIENCE_S), PATIENCE_S)
        self.rig.scheduler.check()
        self.rig.assert_all_free()
        assert [lease.releases for lease in self.leases] == [1] * len(self.leases)


@asynccontextmanager
async def house(*, limits: dict[str, Any] | None = None, **knobs: Any) -> AsyncIterator[House]:
    usual: dict[str, Any] = {"clock": time.monotonic, "sizes": ADAPTER_BYTES}
    rig = make_rig(**(usual | knobs))
    worker = EngineWorker(rig.core)
    service = Service(
        card=CARD,
        tokenizer=TOKENIZER,
        registry=cast(Any, None),
        pool=cast(Any, None),
        worker=worker,
        metrics=Metrics("base", block_size=4, max_lora=4, is_accelerated=False),
        limits=ServiceLimits(**({"max_num_seqs": 8, "max_queued_requests": 1000} | (limits or {}))),
    )
    service.start()
    try:
        yield House(rig, worker, service)
    finally:
        await service.stop()


class Gate:
    """Holds the engine thread inside a step, so that a test can act in a known phase."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.is_open.set()

    def __call__(self, point: str) -> None:
        if point == "start":
            self.arrived.release()
            assert self.is_open.wait(PATIENCE_S)

    async def arrival(self) -> None:
        assert await asyncio.to_thread(self.arrived.acquire, timeout=PATIENCE_S)


async def read(stream: TokenStream) -> list[TokenEvent]:
    async def whole() -> list[TokenEvent]:
        return [event async for batch in stream for event in batch]

    return await asyncio.wait_for(whole(), PATIENCE_S)


def ids_of(events: Items[TokenEvent], index: int = 0) -> list[int]:
    return [event.token.id for event in events if event.token is not None and event.index == index]


def writes(text: str) -> Callable[[Sequence], int]:
    """A model that says this text, over and over."""
    ids = TOKENIZER.encode(text)
    return lambda sequence: ids[sequence.num_generated % len(ids)]


async def test_prompts_are_told_about_however_they_are_cut_and_whoever_else_runs() -> None:
    """Few blocks and small steps: prompts come in chunks, and sequences are thrown out."""
    async with house(num_blocks=12, block_size=4, max_num_batched_tokens=5) as h:
        prompts = [[3 + i] * (2 + 3 * i) for i in range(5)]
        plain = [h.submit(prompt, max_tokens=20) for prompt in prompts]
        scored = h.submit(prompts[0], more_prompts=prompts[1:], num_prompt_logprobs=2, max_tokens=6, n=2)
        pooled = h.submit(
            prompts[0], more_prompts=prompts[1:], pooling=Pooling.MEAN, max_tokens=0, adapter=adapter("a")
        )
        answers = await asyncio.gather(*map(read, [*plain, scored, pooled]))
        events, vectors = answers[-2], answers[-1]
        for choice in range(10):
            prompt = prompts[choice // 2]
            first, *others = [event for event in events if event.index == choice]
            right = expected_scores(prompt, 2)
            assert [token.id for token in first.prompt] == prompt
            assert [token.logprob for token in first.prompt] == [None, *(s.logprob for s in right)]
            assert [token.alternatives for token in first.prompt[1:]] == [s.alternatives for s in right]
            assert not any(event.prompt for event in others)
        assert {event.index: event.vector for event in vectors} == {
            i: expected_vector(prompt, Pooling.MEAN, run=run_of(adapter("a").revision, ADAPTER_BYTES))
            for i, prompt in enumerate(prompts)
        }
        assert len(vectors) == len(prompts)
        metrics = h.service._metrics.snapshot().render("")[0]
        num_prompt = 3 * sum(map(len, prompts))  # once plain, once scored, once pooled
        assert f'vllm:prompt_tokens_total{{engine="0",model_name="base"}} {num_prompt}.0'.encode() in metrics
        await h.assert_all_free()


async def test_a_client_that_leaves_while_its_prompts_are_asked_about_frees_everything() -> None:
    gate = Gate()
    async with house(interrupt=gate, max_num_batched_tokens=4) as h:
        gate.is_open.clear()
        streams = [
            h.submit([5] * 20, more_prompts=[[6] * 20] * 3, adapter=adapter("a"), num_prompt_logprobs=1),
            h.submit([5] * 20, more_prompts=[[6] * 20] * 3, pooling=Pooling.MEAN, max_tokens=0),
        ]
        await gate.arrival()
        for stream in streams:
            stream.close()
        gate.is_open.set()
        await h.assert_all_free()


async def test_streams_of_base_and_adapters_say_what_each_says_alone() -> None:
    async with house() as h:
        chosen = [None, adapter("a"), adapter("b"), None, adapter("a")]
        prompts = [[3 + i] * (4 + 3 * i) for i in range(len(chosen))]
        streams = [h.submit(p, adapter=a, max_tokens=20) for p, a in zip(prompts, chosen, strict=True)]
        answers = await asyncio.gather(*map(read, streams))
        criteria = StopCriteria(max_tokens=20, ignore_eos=True)
        for prompt, ref, events in zip(prompts, chosen, answers, strict=True):
            run = b"" if ref is None else run_of(ref.revision, ADAPTER_BYTES)
            assert ids_of(events) == expected_tokens(prompt, criteria, run=run)
            finish = events[-1].finish
            assert finish is not None
            assert "".join(event.text for event in events) == finish.generated_text
            assert finish.timing.received <= finish.timing.queued <= finish.timing.started
            assert finish.timing.started <= finish.timing.first_token <= finish.timing.last_token
        await h.assert_all_free()


async def test_choices_of_one_request_stream_side_by_side() -> None:
    async with house() as h:
        events = await read(h.submit(n=3, adapter=adapter("a"), max_tokens=6))
        assert [len(ids_of(events, index)) for index in range(3)] == [6, 6, 6]
        assert sum(event.finish is not None for event in events) == 3
        await h.assert_all_free()


async def test_a_stop_string_over_several_tokens_frees_what_the_sequence_held() -> None:
    async with house(choose=writes("abcdefgh")) as h:
        events = await read(h.submit(adapter=adapter("a"), stop=["def"], max_tokens=5000))
        finish = events[-1].finish
        assert finish is not None
        assert (finish.generated_text, finish.stop) == ("abc", "def")
        await h.assert_all_free()


async def test_leaving_while_queued_frees_everything() -> None:
    gate = Gate()
    async with house(interrupt=gate, max_num_seqs=1) as h:
        first = h.submit(max_tokens=50)
        await gate.arrival()
        gate.is_open.clear()
        queued = h.submit(adapter=adapter("a"), max_tokens=50)
        await gate.arrival()
        queued.close()
        gate.is_open.set()
        assert len(ids_of(await read(first))) == 50
        await h.assert_all_free()


async def test_leaving_in_prefill_frees_everything() -> None:
    gate = Gate()
    async with house(interrupt=gate, max_num_batched_tokens=8) as h:
        gate.is_open.clear()
        stream = h.submit(range(2, 60), adapter=adapter("a"))
        await gate.arrival()  # in the first of many chunks
        stream.close()
        gate.is_open.set()
        await h.assert_all_free()
        assert len(h.rig.runner.log) <= 2, "no more forward passes for it"


async def test_leaving_in_the_middle_of_the_stream_frees_everything() -> None:
    async with house(choose=writes("abc"), num_blocks=2048) as h:
        stream = h.submit(adapter=adapter("a"), max_tokens=8000, n=2)
        await asyncio.wait_for(anext(stream), PATIENCE_S)
        stream.close()
        await h.assert_all_free()


async def test_a_reader_that_stops_is_paused_and_then_reads_on_without_a_gap() -> None:
    async with house(num_blocks=512, limits={"max_unread_tokens": 16}) as h:
        slow = h.submit([9, 8, 7], max_tokens=300)
        fast = h.submit([1, 2, 3], max_tokens=300)
        assert len(ids_of(await read(fast))) == 300
        criteria = StopCriteria(max_tokens=300, ignore_eos=True)
        assert ids_of(await read(slow)) == expected_tokens([9, 8, 7], criteria)
        await h.assert_all_free()


async def test_a_reader_that_never_reads_is_ended_and_holds_nothing() -> None:
    limits = {"max_unread_tokens": 16, "send_timeout_s": 0.02}
    async with house(choose=writes("abc"), num_blocks=4096, limits=limits) as h:
        stream = h.submit(adapter=adapter("a"), max_tokens=9000)
        await asyncio.wait_for(h.service._idle.wait(), PATIENCE_S)
        events = await read(stream)
        assert events[-1].finish is not None
        assert events[-1].finish.reason is FinishReason.ERROR
        assert len(events) < 100, "memory per stream is bounded by the limit"
        await h.assert_all_free()


async def test_a_failed_step_ends_its_requests_and_the_next_ones_work() -> None:
    is_broken = threading.Event()

    def interrupt(point: str) -> None:
        if is_broken.is_set():
            raise RuntimeError("out of memory")

    async with house(interrupt=interrupt) as h:
        is_broken.set()
        events = await read(h.submit(adapter=adapter("a"), n=2))
        assert [event.finish.reason for event in events if event.finish] == [FinishReason.ERROR] * 2
        is_broken.clear()
        assert len(ids_of(await read(h.submit(adapter=adapter("a"))))) == 8
        await h.assert_all_free()


async def test_a_row_without_an_answer_is_an_error_for_its_request_alone() -> None:
    async with house() as h:
        h.rig.runner.bad_rows.add(cast(Any, 1))
        bad, good = h.submit([5, 5]), h.submit([6, 6])
        [event] = await read(bad)
        assert event.finish is not None
        assert event.finish.error
        assert len(ids_of(await read(good))) == 8
        await h.assert_all_free()


async def test_a_dead_engine_ends_every_stream_and_releases_every_adapter() -> None:
    def interrupt(point: str) -> None:
        if len(log) > 3:
            raise WrongPlan("worse than an error")

    log: list[Any] = []
    async with house(interrupt=interrupt) as h:
        log = h.rig.runner.log
        streams = [h.submit([4 + i], adapter=adapter("a"), max_tokens=100) for i in range(3)]
        await asyncio.wait_for(h.service.died(), PATIENCE_S)
        for stream in streams:
            finishes = [event.finish for event in await read(stream) if event.finish]
            assert [finish.reason for finish in finishes] == [FinishReason.ERROR]
        assert not h.service.is_alive
        assert [lease.releases for lease in h.leases] == [1, 1, 1]


async def test_draining_lets_streams_end_and_aborts_those_that_do_not() -> None:
    async with house(choose=writes("abc"), num_blocks=8192) as h:
        short, long = h.submit(max_tokens=3), h.submit(adapter=adapter("a"), max_tokens=9000)
        answers = asyncio.gather(read(short), read(long))
        await asyncio.wait_for(h.service.drain(0.3), PATIENCE_S)
        finishes = [events[-1].finish for events in await answers]
        assert [finish.reason for finish in finishes if finish] == [FinishReason.LENGTH, FinishReason.ABORT]
        await h.assert_all_free()


async def test_seeds_do_not_depend_on_the_neighbours() -> None:
    async with house() as h:
        alone = await read(h.submit([7, 7, 7]))
        together = [h.submit([7, 7, 7]) for _ in range(4)]
        for events in await asyncio.gather(*map(read, together)):
            assert ids_of(events) == ids_of(alone)
            assert events[-1].finish is not None
            assert events[-1].finish.seed == 1


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_clients_do_nothing_is_held_afterwards(seed: int) -> None:
    """Random prompts, adapters and lengths on a tiny pool; clients read, stop reading, or leave at any
    time.
    """
    rng = random.Random(seed)

    async def client() -> None:
        stream = h.submit(
            [rng.randrange(2, 97) for _ in range(rng.randint(1, 30))],
            adapter=rng.choice([None, *map(adapter, "abcdef")]),
            max_tokens=rng.randint(1, 40),
            n=rng.choice([1, 1, 1, 3]),
            stop=rng.choice([(), ("a",), ("!", "%&")]),
        )
        num_batches = rng.choice([0, 0, 1, 3, 1000])
        try:
            async for _ in stream:
                num_batches -= 1
                if num_batches <= 0:
                    break
                for _ in range(rng.choice([0, 0, 5])):
                    await asyncio.sleep(0)
        finally:
            if rng.random() < 0.9:
                stream.close()  # else it is dropped

    async with house(num_blocks=24, max_num_seqs=4, limits={"max_unread_tokens": 4}) as h:
        await asyncio.wait_for(asyncio.gather(*(client() for _ in range(60))), PATIENCE_S)
        await h.assert_all_free()
