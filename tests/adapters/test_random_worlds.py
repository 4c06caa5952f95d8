"""Everything at once, at random: requests, swaps, loads, unloads, pins, merges, remotes, failures, people who
leave. After every step the books are recounted; at the end nothing is held.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import pytest

from adapters.errors import AdapterError, AdapterInvalid
from adapters.leases import AdapterLease
from adapters.types import Revision
from tests.adapters.fake_files import FakeWeights
from tests.adapters.stage import ROOT, Stage, one_step

NAMES = ("a", "b", "c", "d")


def made_of(key: str, num_bytes: int, parts: Sequence[FakeWeights]) -> FakeWeights:
    if num_bytes == 13:
        raise AdapterInvalid("these do not go together")
    return FakeWeights(Revision(key), num_bytes)


class World:
    """What happens, by chance."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.chance = random.Random(seed)
        self.held: list[AdapterLease] = []
        self.running: list[asyncio.Task[None]] = []

    def step(self) -> None:
        often = [self.write, self.ask, self.ask, self.release]
        seldom = [self.leave, self.refresh, self.load, self.unload, self.pin, self.merge, self.ask_remote]
        self.chance.choice([*often, *often, *seldom, self.wait])()

    def name(self) -> str:
        return self.chance.choice(NAMES)

    def size(self) -> int:
        return self.chance.choice([5, 10, 13, 30, 60])

    def write(self) -> None:
        """New bytes, the same in two folders now and then, or something broken, or gone."""
        name, revision = self.name(), f"rev-{self.chance.randrange(6)}"
        match self.chance.randrange(8):
            case 0:
                self.stage.source.sub_folders.discard(name)
            case 1:
                self.stage.files.spoil(f"{ROOT}/{name}", AdapterInvalid("NaN"))
            case 2:
                self.stage.files.cut_off(f"{ROOT}/{name}", AdapterInvalid("cut short"))
            case _:
                number = int(revision.removeprefix("rev-"))
                self.stage.put(name, revision, 10 + 8 * number, extras=self.chance.choice([None, "template"]))
        self.stage.hub.put("org/x", f"version of {revision}", revision, 20, readers=(None, "hers"))

    def ask(self) -> None:
        self.run(self.take, partial(self.stage.registry.acquire, self.name()))

    def ask_remote(self) -> None:
        token = self.chance.choice([None, "hers", "his"])
        self.run(self.take, partial(self.stage.registry.acquire, "org/x", source="hub", token=token))

    def merge(self) -> None:
        self.run(self.derive, self.size())

    async def derive(self, num_bytes: int) -> None:
        parts = [lease.again() for lease in self.held[:2]]
        key = "+".join(sorted(part.ref.revision for part in parts))
        try:
            if parts:
                build = partial(made_of, key, num_bytes)
                self.held.append(await self.stage.registry.derive(key, parts, build))
        finally:
            for part in parts:
                part.release()

    async def take(self, ask: Callable[[], Awaitable[AdapterLease]]) -> None:
        self.held.append(await ask())

    def refresh(self) -> None:
        is_settled = self.chance.random() < 0.5
        self.run(partial(self.stage.registry.refresh, self.name(), is_settled=is_settled))

    def load(self) -> None:
        inplace, pinned = self.chance.random() < 0.5, self.chance.random() < 0.2
        load = partial(self.stage.registry.load, load_inplace=inplace, is_pinned=pinned)
        self.run(load, self.name(), f"{ROOT}/{self.name()}")

    def unload(self) -> None:
        self.run(self.stage.registry.unload, self.name())

    def pin(self) -> None:
        change = self.chance.choice([self.stage.registry.pin, self.stage.registry.unpin])
        name = self.name()
        if self.stage.registry.status(name) is not None:
            change(name)

    def release(self) -> None:
        if self.held:
            self.held.pop(self.chance.randrange(len(self.held))).release()

    def leave(self) -> None:
        """Somebody does not wait any longer."""
        if self.running:
            self.chance.choice(self.running).cancel()

    def wait(self) -> None:
        self.stage.clock.now += 7

    def run(self, work: Callable[..., Awaitable[object]], *what: object) -> None:
        async def survive() -> None:
            with contextlib.suppress(AdapterError):
                await work(*what)

        task = asyncio.create_task(survive())
        self.running.append(task)
        task.add_done_callback(self.running.remove)

    def check(self) -> None:
        self.stage.store.check()
        for lease in self.held:
            assert self.stage.store.get(lease.ref.revision).revision == lease.ref.revision

    async def settle(self) -> None:
        """Until nothing is under way."""
        while self.running or self.stage.registry._flights._flights:
            await one_step()
            self.check()


@pytest.mark.parametrize("seed", range(10))
async def test_the_books_are_in_order_whatever_happens(stage: Stage, seed: int) -> None:
    world = World(stage, seed)
    for name in NAMES:
        stage.put(name, f"rev-{name}")
    for number in range(400):
        world.step()
        for _ in range(world.chance.randrange(3)):
            await one_step()
            world.check()
        if number % 40 == 0:
            await world.settle()
            stage.registry.check()
    await world.settle()
    for lease in world.held:
        lease.release()
    for name in NAMES:
        if stage.registry.status(name) is not None:
            stage.registry.unpin(name)
    await world.settle()
    stage.registry.check()
    assert stage.store.total_pins() == 0
    assert all(status.users == 0 for status in stage.registry.statuses())
    assert not stage.pins or stage.pins[-1] == frozenset()

    for name in NAMES:
        await stage.registry.unload(name)
    await stage.crowd_out()
    assert stage.store.num_bytes == 0
