"""Host copies: pins that hold, evictions of idle copies, a budget that what is being read counts against."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from adapters.errors import AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from adapters.store import AdapterStore, NoRoom
from adapters.types import Revision
from tests.adapters.fake_files import LIMIT_S, FakeWeights, Gate


def made(revision: str, num_bytes: int = 10) -> FakeWeights:
    return FakeWeights(Revision(revision), num_bytes)


def reading(
    revision: str, num_bytes: int = 10, *, gate: Gate | None = None, error: Exception | None = None
) -> Callable[[], FakeWeights]:
    """Something to run in the pool."""

    def read() -> FakeWeights:
        if gate is not None:
            gate.pass_through()
        if error is not None:
            raise error
        return made(revision, num_bytes)

    return read


class Stage:
    """A store of 100 bytes."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.store: AdapterStore[FakeWeights] = AdapterStore(pool, 100)
        self.evicted: list[str] = []
        self.store.on_evicted = self.evicted.append

    async def load(self, revision: str, num_bytes: int = 10) -> FakeWeights:
        return await self.store.load(num_bytes, reading(revision, num_bytes))

    async def use(self, revision: str, num_bytes: int = 10) -> None:
        """Load and let go: the copy stays, idle."""
        await self.load(revision, num_bytes)
        self.store.unpin(Revision(revision))

    def begin(
        self, revision: str, num_bytes: int = 10, gate: Gate | None = None
    ) -> "asyncio.Task[FakeWeights]":
        return asyncio.create_task(self.store.load(num_bytes, reading(revision, num_bytes, gate=gate)))

    def loaded(self, *revisions: str) -> list[str]:
        return [name for name in revisions if self.store.is_loaded(Revision(name))]


@pytest.fixture
def stage(pool: ThreadPoolExecutor) -> Iterator[Stage]:
    stage = Stage(pool)
    yield stage
    stage.store.check()


async def reached(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.is_reached.wait, LIMIT_S)


async def one_step() -> None:
    await asyncio.sleep(0)


async def test_a_loaded_copy_is_pinned_for_who_loaded_it(stage: Stage) -> None:
    weights = await stage.load("a", 60)

    assert stage.store.get(weights.revision) is weights
    assert stage.store.num_bytes == 60
    with pytest.raises(AdapterUnavailable):
        await stage.load("b", 60)


async def test_a_revision_that_is_there_is_not_kept_twice(stage: Stage) -> None:
    first = await stage.load("same", 60)

    assert await stage.store.load(40, reading("same", 60)) is first
    assert stage.store.num_bytes == 60
    stage.store.unpin(Revision("same"))
    stage.store.discard(Revision("same"))
    assert stage.loaded("same"), "each load has a pin"
    stage.store.unpin(Revision("same"))
    assert not stage.loaded("same")


async def test_who_is_cancelled_as_the_load_lands_gives_the_pin_back(stage: Stage) -> None:
    land = stage.store._land

    def land_and_cancel(*landing: Any) -> None:
        land(*landing)
        leaver.cancel()

    stage.store._land = land_and_cancel  # type: ignore[method-assign]
    leaver = stage.begin("a")
    await asyncio.wait((leaver,))

    assert leaver.cancelled()
    assert stage.loaded("a")
    assert stage.store.total_pins() == 0


async def test_what_nobody_waits_for_any_more_is_dropped_when_it_was_read(stage: Stage) -> None:
    gate = Gate()
    leaver = stage.begin("a", 60, gate)
    await reached(gate)
    leaver.cancel()
    await asyncio.wait((leaver,))
    waiting = stage.begin("b", 60)
    await one_step()
    gate.is_open.set()

    assert (await waiting).revision == "b"
    assert stage.loaded("a", "b") == ["b"]


async def test_the_longest_idle_copies_make_room(stage: Stage) -> None:
    for name in "abc":
        await stage.use(name, 30)
    stage.store.pin(Revision("a"))
    stage.store.unpin(Revision("a"))  # now b is idle for longer

    await stage.use("d", 40)

    assert stage.loaded(*"abcd") == ["a", "c", "d"]
    assert stage.evicted == ["b"]


async def test_copies_in_use_are_never_evicted(stage: Stage) -> None:
    pinned = await stage.load("a", 40)
    for number in range(20):
        await stage.use(str(number), 50)

    assert stage.store.get(Revision("a")) is pinned
    assert stage.store.num_bytes == 90


async def test_a_load_without_room_reads_and_evicts_nothing(stage: Stage) -> None:
    await stage.load("a", 60)
    await stage.use("b", 30)
    reads: list[str] = []

    with pytest.raises(NoRoom) as refusal:
        await stage.store.load(50, lambda: reads.append("c") or made("c", 50))

    assert refusal.value.retry_after_s > 0
    assert reads == []
    assert stage.loaded("a", "b", "c") == ["a", "b"]


async def test_what_never_fits_is_too_large(stage: Stage) -> None:
    with pytest.raises(AdapterTooLarge, match="101 bytes"):
        await stage.load("a", 101)


async def test_what_is_larger_than_its_header_said_needs_room_all_the_same(stage: Stage) -> None:
    await stage.load("a", 60)
    with pytest.raises(NoRoom):
        await stage.store.load(10, reading("b", 50))
    with pytest.raises(AdapterTooLarge):
        await stage.store.load(10, reading("b", 101))

    assert (await stage.store.load(10, reading("b", 40))).num_bytes == 40


async def test_what_is_being_read_counts_from_the_begin(stage: Stage) -> None:
    await stage.use("old", 70)
    gate = Gate()
    first = stage.begin("a", 60, gate)
    await reached(gate)

    assert stage.store.num_bytes == 0, "room was made before the reading began"
    assert stage.store.free_bytes == 40
    second = stage.begin("b", 60)
    third = stage.begin("c", 10)
    await one_step()
    stage.store.check()
    assert not second.done(), "waits for what the first turns out to need, and is not refused"
    gate.is_open.set()
    await first
    stage.store.unpin(Revision("a"))

    with pytest.raises(NoRoom):
        await second  # the first was in use when its turn came
    assert (await third).revision == "c"


async def test_a_load_goes_on_when_what_it_waited_for_has_failed(stage: Stage) -> None:
    gate = Gate()
    failing = asyncio.create_task(
        stage.store.load(60, reading("a", gate=gate, error=AdapterInvalid("broken")))
    )
    await reached(gate)
    waiting = stage.begin("b", 60)
    gate.is_open.set()

    with pytest.raises(AdapterInvalid, match="broken"):
        await failing
    assert (await waiting).revision == "b"


async def test_only_so_many_are_read_at_once_and_in_order(stage: Stage) -> None:
    gates = [Gate() for _ in range(4)]
    loads = [stage.begin(str(number), gate=gate) for number, gate in enumerate(gates)]
    await reached(gates[0])
    await reached(gates[1])
    await one_step()
    assert not gates[2].is_reached.is_set()

    gates[1].is_open.set()
    await reached(gates[2])
    assert not gates[3].is_reached.is_set()
    for gate in gates:
        gate.is_open.set()

    assert [weights.revision for weights in await asyncio.gather(*loads)] == ["0", "1", "2", "3"]


async def test_who_leaves_the_queue_does_not_hold_up_those_behind(stage: Stage) -> None:
    gate = Gate()
    first = stage.begin("a", 60, gate)
    await reached(gate)
    leaver = stage.begin("b", 60)
    behind = stage.begin("c", 20)
    await one_step()
    leaver.cancel()

    assert (await behind).revision == "c", "not after the first"
    assert not first.done()
    gate.is_open.set()
    await first


async def test_an_unforeseen_failure_is_logged_and_an_adapter_error(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(AdapterInvalid):
        await stage.store.load(10, reading("a", error=ZeroDivisionError()))

    assert "unforeseen" in caplog.text


async def test_a_discarded_copy_goes_at_once_or_with_its_last_pin(stage: Stage) -> None:
    await stage.use("idle")
    await stage.load("used")

    for revision in ("idle", "used", "unknown"):
        stage.store.discard(Revision(revision))

    assert stage.loaded("idle", "used") == ["used"]
    stage.store.unpin(Revision("used"))
    assert stage.store.num_bytes == 0
    assert stage.evicted == ["idle", "used"]


async def test_a_discarded_copy_that_is_loaded_again_stays(stage: Stage) -> None:
    await stage.load("a")
    stage.store.discard(Revision("a"))

    await stage.use("a")
    stage.store.unpin(Revision("a"))

    assert stage.loaded("a") == ["a"]


async def test_loads_that_the_closing_pool_drops_end_as_unavailable() -> None:
    pool = ThreadPoolExecutor(1)
    stage = Stage(pool)
    gate = Gate()
    running = stage.begin("a", gate=gate)
    await reached(gate)
    queued = stage.begin("b")
    await one_step()
    pool.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(AdapterUnavailable, match="shutting down"):
        await queued
    with pytest.raises(AdapterUnavailable, match="shutting down"):
        await stage.load("c")
    gate.is_open.set()

    assert (await running).revision == "a"


async def test_another_thread_finds_pinned_copies_while_others_come_and_go(stage: Stage) -> None:
    weights = await stage.load("a", 40)
    is_over = threading.Event()

    def read_on() -> int:
        num_reads = 0
        while not is_over.is_set() or not num_reads:
            assert stage.store.get(Revision("a")) is weights
            num_reads += 1
        return num_reads

    reader = asyncio.create_task(asyncio.to_thread(read_on))
    for number in range(100):
        await stage.use(str(number), 25)
        stage.store.pin(Revision("a"))
        stage.store.unpin(Revision("a"))
    is_over.set()

    assert await reader > 0


@pytest.mark.parametrize("seed", range(6))
async def test_random_uses_leave_the_books_in_order(stage: Stage, seed: int) -> None:
    chance = random.Random(seed)
    held: list[FakeWeights] = []
    for _ in range(150):
        match chance.choice(["load", "load", "unpin", "discard", "burst"]):
            case "load":
                await _try_to_load(stage, held, chance)
            case "burst":
                await asyncio.gather(*(_try_to_load(stage, held, chance) for _ in range(5)))
            case "unpin" if held:
                stage.store.unpin(held.pop(chance.randrange(len(held))).revision)
            case "discard":
                stage.store.discard(Revision(f"rev-{chance.randrange(10)}"))
        stage.store.check()
        assert all(stage.store.get(weights.revision) is weights for weights in held)
    for weights in held:
        stage.store.unpin(weights.revision)
    stage.store.check()


async def _try_to_load(stage: Stage, held: list[FakeWeights], chance: random.Random) -> None:
    """Now and then the header says too much, too little, or the numbers are broken."""
    number = chance.randrange(10)
    num_bytes = 10 + 5 * number
    error = AdapterInvalid("broken") if chance.random() < 0.1 else None
    load = stage.store.load(
        num_bytes + chance.choice([0, 0, 0, -5, 5]), reading(f"rev-{number}", num_bytes, error=error)
    )
    task = asyncio.create_task(load)
    if chance.random() < 0.1:
        await one_step()
        task.cancel()
    try:
        held.append(await task)
    except AdapterUnavailable:
        if held:
            stage.store.unpin(held.pop(0).revision)
    except (AdapterInvalid, asyncio.CancelledError):
        pass
