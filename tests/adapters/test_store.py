"""Host copies: one load for all who wait, pins that hold, evictions of idle copies, failures that expire."""

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.errors import AdapterIncompatible, AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from adapters.store import AdapterStore
from adapters.types import Revision
from tests.adapters.fake_files import LIMIT_S, FakeClock, FakeFiles, FakeWeights, Gate


class Stage:
    """A store of 100 bytes over made-up files."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.files = FakeFiles()
        self.clock = FakeClock()
        self.seconds: list[float] = []
        self.store: AdapterStore[FakeWeights] = AdapterStore(
            self.files.load, pool, 100, self.clock, on_loaded=self.seconds.append
        )

    async def use(self, folder: Path) -> Revision:
        """Load and let go: the copy stays, idle."""
        weights = await self.store.load(folder)
        self.store.unpin(weights.revision)
        return weights.revision

    def loaded(self, *revisions: str) -> list[str]:
        return [name for name in revisions if self.store.is_loaded(Revision(name))]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def stage(pool: ThreadPoolExecutor) -> Iterator[Stage]:
    stage = Stage(pool)
    yield stage
    stage.store.check()


async def reached(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.is_reached.wait, LIMIT_S)


async def begun(task: "asyncio.Task[FakeWeights]") -> "asyncio.Task[FakeWeights]":
    """Let the task run until it waits."""
    await asyncio.wait((asyncio.create_task(asyncio.sleep(0)),))
    assert not task.done()
    return task


async def test_a_loaded_copy_is_pinned_for_who_loaded_it(stage: Stage) -> None:
    weights = await stage.store.load(stage.files.put("/a", "rev-a", 60))

    assert stage.store.get(weights.revision) is weights
    assert stage.store.num_bytes == 60
    with pytest.raises(AdapterUnavailable):
        await stage.store.load(stage.files.put("/b", "rev-b", 60))


async def test_two_who_wait_share_one_load_and_have_a_pin_each(stage: Stage) -> None:
    folder = stage.files.put("/a", "rev-a", 60)
    with stage.files.held("/a") as gate:
        first = asyncio.create_task(stage.store.load(folder))
        await reached(gate)
        second = await begun(asyncio.create_task(stage.store.load(folder)))

    assert await first is await second
    assert stage.files.reads == [folder]
    stage.store.unpin(Revision("rev-a"))
    stage.store.discard(Revision("rev-a"))
    assert stage.loaded("rev-a")
    stage.store.unpin(Revision("rev-a"))
    assert not stage.loaded("rev-a")


async def test_who_leaves_does_not_end_the_load_of_others(stage: Stage) -> None:
    folder = stage.files.put("/a", "rev-a")
    with stage.files.held("/a") as gate:
        leaver = asyncio.create_task(stage.store.load(folder))
        await reached(gate)
        stayer = await begun(asyncio.create_task(stage.store.load(folder)))
        leaver.cancel()
        await asyncio.wait((leaver,))

    assert (await stayer).revision == "rev-a"
    stage.store.unpin(Revision("rev-a"))
    stage.store.discard(Revision("rev-a"))
    assert leaver.cancelled()
    assert not stage.loaded("rev-a"), "the one who left holds nothing"


async def test_a_load_goes_on_when_nobody_waits_any_more(stage: Stage) -> None:
    folder = stage.files.put("/a", "rev-a")
    with stage.files.held("/a") as gate:
        leaver = asyncio.create_task(stage.store.load(folder))
        await reached(gate)
        leaver.cancel()
        await asyncio.wait((leaver,))
        newcomer = await begun(asyncio.create_task(stage.store.load(folder)))

    assert (await newcomer).revision == "rev-a"
    assert stage.files.reads == [folder]


async def test_who_is_cancelled_as_the_load_lands_gives_the_pin_back(pool: ThreadPoolExecutor) -> None:
    files = FakeFiles()
    folder = files.put("/a", "rev-a")
    landed: list[float] = []

    def cancel_between_landing_and_waking(seconds: float) -> None:
        landed.append(seconds)
        task.cancel()

    store = AdapterStore(files.load, pool, 100, FakeClock(), on_loaded=cancel_between_landing_and_waking)
    task = asyncio.create_task(store.load(folder))
    await asyncio.wait((task,))

    assert landed
    assert task.cancelled()
    store.check()
    store.discard(Revision("rev-a"))
    assert not store.is_loaded(Revision("rev-a"))


async def test_unchanged_files_give_the_copy_that_is_there(stage: Stage) -> None:
    first = await stage.store.load(stage.files.put("/a", "rev-a"))
    stage.files.put("/a", "rev-a")  # an equal object, not the same

    assert await stage.store.load(Path("/a")) is first
    assert stage.store.num_bytes == 10


async def test_changed_files_give_another_revision_beside_the_one_in_use(stage: Stage) -> None:
    old = await stage.store.load(stage.files.put("/a", "rev-1"))
    new = await stage.store.load(stage.files.put("/a", "rev-2"))

    assert stage.store.get(old.revision) is old
    assert stage.store.get(new.revision) is new


async def test_two_folders_of_one_revision_share_a_copy(stage: Stage) -> None:
    first = await stage.store.load(stage.files.put("/a", "same", 60))

    assert await stage.store.load(stage.files.put("/b", "same", 60)) is first
    assert stage.store.num_bytes == 60


async def test_the_longest_idle_copies_make_room(stage: Stage) -> None:
    for name in "abc":
        await stage.use(stage.files.put(f"/{name}", name, 30))
    stage.store.pin(Revision("a"))
    stage.store.unpin(Revision("a"))  # now b is idle for longer

    await stage.use(stage.files.put("/d", "d", 40))

    assert stage.loaded(*"abcd") == ["a", "c", "d"]


async def test_copies_in_use_are_never_evicted(stage: Stage) -> None:
    pinned = await stage.store.load(stage.files.put("/a", "a", 40))
    for number in range(20):
        await stage.use(stage.files.put(f"/{number}", str(number), 50))

    assert stage.store.get(Revision("a")) is pinned
    assert stage.store.num_bytes == 90


async def test_a_load_without_room_evicts_nothing(stage: Stage) -> None:
    await stage.store.load(stage.files.put("/a", "a", 60))
    await stage.use(stage.files.put("/b", "b", 30))

    with pytest.raises(AdapterUnavailable) as refusal:
        await stage.store.load(stage.files.put("/c", "c", 50))

    assert refusal.value.retry_after_s > 0
    assert stage.loaded("a", "b", "c") == ["a", "b"]


async def test_files_are_not_read_again_while_there_is_no_room(stage: Stage) -> None:
    await stage.store.load(stage.files.put("/a", "a", 60))
    folder = stage.files.put("/b", "b", 60)
    for _ in range(3):
        with pytest.raises(AdapterUnavailable):
            await stage.store.load(folder)
    assert stage.files.reads.count(folder) == 1

    stage.store.unpin(Revision("a"))

    assert (await stage.store.load(folder)).revision == "b"


async def test_what_never_fits_is_too_large(stage: Stage) -> None:
    with pytest.raises(AdapterTooLarge, match="101 bytes"):
        await stage.store.load(stage.files.put("/a", "a", 101))


async def test_a_failure_is_repeated_from_memory_until_it_expires(stage: Stage) -> None:
    folder = stage.files.spoil("/a", AdapterIncompatible("wrong shape"))
    for _ in range(3):
        with pytest.raises(AdapterIncompatible, match="wrong shape"):
            await stage.store.load(folder)
    assert stage.files.reads == [folder]

    stage.files.put("/a", "mended")
    stage.clock.now += 60

    assert (await stage.store.load(folder)).revision == "mended"


async def test_expired_failures_do_not_pile_up(stage: Stage) -> None:
    for number in range(5):
        stage.clock.now += 60
        with pytest.raises(AdapterInvalid):
            await stage.store.load(stage.files.spoil(f"/{number}", AdapterInvalid("broken")))

    assert list(stage.store._failures) == [Path("/4")]


async def test_an_operator_does_not_wait_for_a_failure_to_expire(stage: Stage) -> None:
    folder = stage.files.spoil("/a", AdapterInvalid("broken"))
    with pytest.raises(AdapterInvalid):
        await stage.store.load(folder)
    stage.files.put("/a", "mended")

    assert (await stage.store.load(folder, anew=True)).revision == "mended"
    assert (await stage.store.load(folder)).revision == "mended", "the failure is forgotten for all"


async def test_all_who_wait_get_the_failure(stage: Stage) -> None:
    folder = stage.files.spoil("/a", AdapterInvalid("broken"))
    with stage.files.held("/a") as gate:
        tasks = [asyncio.create_task(stage.store.load(folder))]
        await reached(gate)
        tasks.append(await begun(asyncio.create_task(stage.store.load(folder))))

    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [AdapterInvalid, AdapterInvalid]
    assert stage.files.reads == [folder]


async def test_a_remembered_failure_keeps_nothing_alive_of_what_was_read(stage: Stage) -> None:
    broken = AdapterInvalid("broken")
    broken.__cause__ = ValueError("with frames of its own")
    folder = stage.files.spoil("/a", broken)
    with pytest.raises(AdapterInvalid):
        await stage.store.load(folder)

    with pytest.raises(AdapterInvalid) as again:
        await stage.store.load(folder)

    assert again.value.__cause__ is None
    places = [frame.name for frame in again.traceback]
    assert places.count("load") == 1, "only the way of the second call"
    assert "_read" not in places


async def test_an_unforeseen_failure_is_logged_and_an_adapter_error(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stage.files.spoil("/a", ZeroDivisionError())

    with pytest.raises(AdapterInvalid):
        await stage.store.load(folder)

    assert "unforeseen" in caplog.text


async def test_a_load_anew_does_not_join_an_older_one(stage: Stage) -> None:
    folder = stage.files.put("/a", "old")
    with stage.files.held("/a") as gate:
        older = asyncio.create_task(stage.store.load(folder))
        await reached(gate)
        stage.files.put("/a", "new")
        newer = await begun(asyncio.create_task(stage.store.load(folder, anew=True)))
        joined = await begun(asyncio.create_task(stage.store.load(folder)))

    assert (await older).revision == "old"
    assert (await newer).revision == (await joined).revision == "new"
    assert len(stage.files.reads) == 2


async def test_the_failure_of_an_overtaken_load_is_not_remembered(stage: Stage) -> None:
    folder = stage.files.spoil("/a", AdapterInvalid("broken"))
    with stage.files.held("/a", limit=1) as gate:
        older = asyncio.create_task(stage.store.load(folder))
        await reached(gate)
        stage.files.put("/a", "mended")
        await stage.store.load(folder, anew=True)
    with pytest.raises(AdapterInvalid):
        await older

    assert (await stage.store.load(folder)).revision == "mended"


async def test_a_discarded_copy_goes_at_once_or_with_its_last_pin(stage: Stage) -> None:
    await stage.use(stage.files.put("/idle", "idle"))
    await stage.store.load(stage.files.put("/used", "used"))

    for revision in ("idle", "used", "unknown"):
        stage.store.discard(Revision(revision))

    assert stage.loaded("idle", "used") == ["used"]
    stage.store.unpin(Revision("used"))
    assert stage.store.num_bytes == 0


async def test_a_discarded_copy_that_is_loaded_again_stays(stage: Stage) -> None:
    folder = stage.files.put("/a", "a")
    await stage.store.load(folder)
    stage.store.discard(Revision("a"))

    await stage.use(folder)
    stage.store.unpin(Revision("a"))

    assert stage.loaded("a") == ["a"]


async def test_loads_that_the_closing_pool_drops_end_as_unavailable() -> None:
    pool = ThreadPoolExecutor(1)
    stage = Stage(pool)
    with stage.files.held("/a") as gate:
        running = asyncio.create_task(stage.store.load(stage.files.put("/a", "a")))
        await reached(gate)
        queued = await begun(asyncio.create_task(stage.store.load(stage.files.put("/b", "b"))))
        pool.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(AdapterUnavailable, match="shutting down"):
            await queued
    assert (await running).revision == "a"


async def test_the_time_of_successful_loads_is_told(stage: Stage) -> None:
    with stage.files.held("/a") as gate:
        load = asyncio.create_task(stage.store.load(stage.files.put("/a", "a")))
        await reached(gate)
        stage.clock.now += 1.5
    await load
    with pytest.raises(AdapterInvalid):
        await stage.store.load(stage.files.spoil("/b", AdapterInvalid("broken")))

    assert stage.seconds == [1.5]


async def test_another_thread_finds_pinned_copies_while_others_come_and_go(stage: Stage) -> None:
    weights = await stage.store.load(stage.files.put("/a", "a", 40))
    is_over = threading.Event()

    def read_on() -> int:
        num_reads = 0
        while not is_over.is_set() or not num_reads:
            assert stage.store.get(Revision("a")) is weights
            num_reads += 1
        return num_reads

    reader = asyncio.create_task(asyncio.to_thread(read_on))
    for number in range(100):
        await stage.use(stage.files.put(f"/{number}", str(number), 25))
        stage.store.pin(Revision("a"))
        stage.store.unpin(Revision("a"))
    is_over.set()

    assert await reader > 0


@pytest.mark.parametrize("seed", range(6))
async def test_random_uses_leave_the_books_in_order(stage: Stage, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(12):
        stage.files.put(f"/{number}", f"rev-{number % 10}", num_bytes=10 + 5 * (number % 10))
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
    try:
        held.append(await stage.store.load(Path(f"/{chance.randrange(12)}")))
    except AdapterUnavailable:
        if held:
            stage.store.unpin(held.pop(0).revision)
