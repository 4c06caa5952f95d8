"""Merged adapters: built once for all who ask, kept like host copies, never listed."""

import asyncio
from collections.abc import Sequence

import pytest

from adapters.errors import AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from adapters.leases import AdapterLease
from adapters.types import Revision
from tests.adapters.fake_files import FakeWeights, Gate
from tests.adapters.stage import Stage, one_step, reached, without_suspending


class Maker:
    """Builds sums, and counts how often."""

    def __init__(self, num_bytes: int = 10, error: Exception | None = None, gate: Gate | None = None) -> None:
        self.num_built = 0
        self._num_bytes = num_bytes
        self._error = error
        self._gate = gate

    def __call__(self, parts: Sequence[FakeWeights]) -> FakeWeights:
        self.num_built += 1
        if self._gate is not None:
            self._gate.pass_through()
        if self._error is not None:
            raise self._error
        return FakeWeights(Revision("+".join(part.revision for part in parts)), self._num_bytes)


async def parts_of(stage: Stage) -> list[AdapterLease]:
    for name in ("a", "b"):
        stage.put(name, f"rev-{name}")
    return [await stage.registry.acquire(name) for name in ("a", "b")]


async def test_a_merge_is_built_once_and_kept(stage: Stage) -> None:
    parts, make = await parts_of(stage), Maker()
    first = await stage.registry.derive("a+b", parts, make)

    again = without_suspending(stage.registry.derive("a+b", parts, make))

    assert (first.ref, first.ref.name, first.ref.revision) == (again.ref, "a+b", "rev-a+rev-b")
    assert (first.info.rank, first.info.num_bytes, first.extras) == (8, 10, None)
    assert make.num_built == 1
    assert stage.names() == ["a", "b"]
    assert [status.users for status in stage.registry.statuses()] == [1, 1], (
        "parts are held while it is built"
    )


async def test_all_who_ask_at_once_share_the_building(stage: Stage) -> None:
    parts, gate = await parts_of(stage), Gate()
    make = Maker(gate=gate)
    asked = [asyncio.create_task(stage.registry.derive("a+b", parts, make)) for _ in range(3)]
    await reached(gate)
    asked[0].cancel()
    for part in parts:
        part.release()
    await stage.registry.unload("a")
    assert stage.is_held("rev-a"), "the building holds it"
    gate.is_open.set()

    leases = await asyncio.gather(*asked[1:])

    assert make.num_built == 1
    assert not stage.store.is_loaded(Revision("rev-a"))
    for lease in leases:
        assert stage.is_held("rev-a+rev-b")
        lease.release()
    assert not stage.is_held("rev-a+rev-b")


async def test_an_evicted_merge_is_built_again(stage: Stage) -> None:
    parts, make = await parts_of(stage), Maker()
    (await stage.registry.derive("a+b", parts, make)).release()
    await stage.crowd_out()

    (await stage.registry.derive("a+b", parts, make)).release()

    assert make.num_built == 2


@pytest.mark.parametrize("error", [AdapterInvalid("ranks differ"), AdapterTooLarge("too large")])
async def test_what_building_raises_passes_through(stage: Stage, error: Exception) -> None:
    parts = await parts_of(stage)

    with pytest.raises(type(error), match=str(error)):
        await stage.registry.derive("a+b", parts, Maker(error=error))

    for part in parts:
        part.release()
    assert stage.store.total_pins() == 0


async def test_a_merge_needs_room_like_everybody(stage: Stage) -> None:
    stage.put("big", "rev-big", 60)
    parts = [await stage.registry.acquire("big")]

    with pytest.raises(AdapterUnavailable):
        await stage.registry.derive("big+", parts, Maker())
    with pytest.raises(AdapterUnavailable):
        await stage.registry.derive("big+", parts, Maker(50))


async def test_only_so_many_merges_are_known(stage: Stage) -> None:
    parts = await parts_of(stage)
    held = await stage.registry.derive("held", parts, lambda parts: FakeWeights(Revision("held"), 0))
    for number in range(300):

        def make(parts: Sequence[FakeWeights], number: int = number) -> FakeWeights:
            return FakeWeights(Revision(f"merge-{number}"), 0)

        (await stage.registry.derive(f"merge-{number}", parts, make)).release()
    await one_step()

    assert len(stage.registry._merged._known) == 256
    assert not stage.store.is_loaded(Revision("merge-0"))
    assert stage.store.is_loaded(Revision("merge-299"))
    assert stage.is_held("held")
    held.release()
