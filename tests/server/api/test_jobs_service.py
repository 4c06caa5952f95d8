"""Dropped job streams over the real service, engine thread and core: what they cost while nobody reads.

Rows J8 and J9 with the engine's side.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server.api.state import Phase
from server.engine.sequence import Sequence
from tests.server.api.raw_http import Connection, RawAnswer, ask, get, post, until
from tests.server.api.test_jobs_streams import EventSource, connect, read_rest
from tests.server.api.test_real_service import House, house

PATH = "/api/jobs/{job}/infer/stream?prompt=Hi&temperature=0&max_new_tokens=40"
BLOCK_SIZE = 4
NUM_BLOCKS = 16


class Steps:
    """Lets the engine do so many steps."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)

    def __call__(self, point: str) -> None:
        if point == "start":
            assert self._permits.acquire(timeout=30)

    def allow(self, count: int) -> None:
        self._permits.release(count)


@asynccontextmanager
async def stepped_house() -> AsyncIterator[tuple[House, Steps]]:
    """Few blocks, no ends of sequence, and steps as the test allows them."""
    steps = Steps()
    knobs: dict[str, Any] = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "eos_token_ids": ()}
    async with house(interrupt=steps, **knobs) as h:
        try:
            yield h, steps
        finally:
            steps.allow(10_000)


async def drop_in_the_middle(h: House, steps: Steps, source: EventSource, path: str) -> Sequence:
    """Read an event, go away, and return the sequence once the engine has paused it."""
    connection, answer = await begin(h, steps, source, path)
    assert answer.status == 200
    connection.drop()
    await until(lambda: h.state.recordings.num_paused == 1)
    steps.allow(1)  # it is in this step; commands are taken after it
    [sequence] = h.rig.scheduler._sequences.values()
    await until(lambda: sequence.is_paused)
    return sequence


async def begin(h: House, steps: Steps, source: EventSource, path: str) -> tuple[Connection, RawAnswer]:
    steps.allow(6)
    connection, answer = await connect(h.port, source, path)
    source.feed(await connection.read_chunk())
    return connection, answer


async def whole_answer(job: str) -> str:
    """What the job says if nobody disturbs it."""
    async with house(eos_token_ids=()) as h:
        body = {"prompt": "Hi", "temperature": 0, "max_new_tokens": 40}
        answer = await ask(h.port, post(f"/api/jobs/{job}/infer", body))
    return str(json.loads(answer.body)["response"])


@pytest.mark.parametrize("job", ["base", "a"])
async def test_J9_dropped_stream_does_no_forward_passes_and_says_the_same_in_the_end(job: str) -> None:
    path = PATH.format(job=job)
    async with stepped_house() as (h, steps):
        source = EventSource()
        sequence = await drop_in_the_middle(h, steps, source, path)
        num_steps, num_tokens = len(h.rig.runner.log), sequence.num_tokens
        steps.allow(10_000)
        other = await ask(h.port, post("/v1/completions", {"prompt": "Ho", "max_tokens": 12}))
        assert other.status == 200
        assert len(h.rig.runner.log) >= num_steps + 12
        assert all(sequence.id not in step for step in h.rig.runner.log[num_steps:])
        assert sequence.num_tokens == num_tokens

        connection, _ = await connect(h.port, source, path)
        await read_rest(connection, source)
        assert source.text == await whole_answer(job)
        assert source.ids == [f"{source.last_id.partition(':')[0]}:{n + 1}" for n in range(len(source.ids))]
        assert (await ask(h.port, source.request(path))).status == 204
        assert len(h.registry.leases) == (job != "base"), "one generation"
        await h.everything_is_free()


async def test_J9_blocks_of_a_dropped_stream_are_taken_and_made_again() -> None:
    path = PATH.format(job="base")
    async with stepped_house() as (h, steps):
        source = EventSource()
        sequence = await drop_in_the_middle(h, steps, source, path)
        assert sequence.block_table
        steps.allow(10_000)
        num_prompt = (NUM_BLOCKS - 2) * BLOCK_SIZE
        hungry = post("/v1/completions", {"prompt": [65] * num_prompt, "max_tokens": 2 * BLOCK_SIZE})
        assert (await ask(h.port, hungry)).status == 200
        assert sequence.is_paused
        assert not sequence.block_table

        connection, _ = await connect(h.port, source, path)
        await read_rest(connection, source)
        assert source.text == await whole_answer("base")
        await h.everything_is_free()


async def test_adapter_of_a_dropped_stream_is_held_until_its_window_is_over() -> None:
    async with stepped_house() as (h, steps):
        source = EventSource()
        await drop_in_the_middle(h, steps, source, PATH.format(job="a"))
        [lease] = h.registry.leases
        assert lease.num_released == 0
        h.state.recordings.close()  # as the end of the window does to what is paused
        await h.everything_is_free()
        assert lease.num_released == 1


async def test_dropped_streams_count_in_the_drain() -> None:
    """It ends with the drain at the latest, and a client that comes back in time is told so."""
    path = PATH.format(job="a")
    async with stepped_house() as (h, steps):
        source = EventSource()
        await drop_in_the_middle(h, steps, source, path)
        h.state.phase = Phase.DRAINING
        draining = asyncio.create_task(h.service.drain(30))
        assert (await ask(h.port, get(path))).status == 503
        assert not draining.done()
        connection, _ = await connect(h.port, source, path)
        steps.allow(10_000)
        await read_rest(connection, source)
        await asyncio.wait_for(draining, 30)
        assert source.text == await whole_answer("a")
        await h.everything_is_free()


async def test_dropped_stream_that_nobody_comes_back_to_does_not_outlast_the_drain() -> None:
    path = PATH.format(job="a")
    async with stepped_house() as (h, steps):
        source = EventSource()
        await drop_in_the_middle(h, steps, source, path)
        h.state.phase = Phase.DRAINING
        await asyncio.wait_for(h.service.drain(0), 30)
        connection, _ = await connect(h.port, source, path)
        await read_rest(connection, source)
        assert source.messages[-2:] == ['{"error": "the server is shutting down"}', "[DONE]"]
        h.state.recordings.close()
        assert len(h.state.recordings) == 0
        await h.everything_is_free()
