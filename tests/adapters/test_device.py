"""Both arenas give the kernels the same views, whatever was placed, moved and evicted before."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from adapters.device import Arena, DeviceArena, HostArena, make_arena
from adapters.placement import AdapterPlacement
from adapters.run import RunLayout
from adapters.types import AdapterRef, AdapterWrite, LoraEntry, Revision, TargetId

CPU = torch.device("cpu")


@dataclass(frozen=True)
class HostCopy:
    run: Tensor
    layout: RunLayout


def host_copy(rank: int, fill: float) -> HostCopy:
    """An adapter of two targets, 4 -> 6 and 6 -> 4."""
    size = rank * 10
    entries = {
        TargetId(0): LoraEntry(rank, 4, 6, 0, rank * 4),
        TargetId(2): LoraEntry(rank, 6, 4, size, size + rank * 6),
    }
    return HostCopy(torch.arange(2 * size, dtype=torch.float32) + fill, RunLayout(entries))


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, Revision(name))


@pytest.mark.parametrize("arena", [HostArena(), DeviceArena(CPU, 4096, torch.float32)])
def test_views_are_the_halves_of_the_run(arena: Arena) -> None:
    weights = host_copy(rank=2, fill=100.0)
    arena.write(AdapterWrite(ref("a"), 64, weights.run.nbytes), weights)

    linears = arena.adapter(Revision("a")).linears

    torch.testing.assert_close(linears[TargetId(2)].a, weights.run[20:32].view(2, 6))
    torch.testing.assert_close(linears[TargetId(2)].b, weights.run[32:40].view(2, 4).t())
    assert list(linears) == [TargetId(0), TargetId(2)]


def test_host_arena_keeps_the_host_copy_itself() -> None:
    arena, weights = HostArena(), host_copy(rank=1, fill=0.0)
    arena.write(AdapterWrite(ref("a"), 0, weights.run.nbytes), weights)

    assert arena.adapter(Revision("a")).linears[TargetId(0)].a.data_ptr() == weights.run.data_ptr()


@pytest.mark.parametrize("arena", [HostArena(), DeviceArena(CPU, 4096, torch.float32)])
def test_eviction_can_be_repeated(arena: Arena) -> None:
    weights = host_copy(rank=1, fill=0.0)
    arena.write(AdapterWrite(ref("a"), 0, weights.run.nbytes), weights)
    arena.evict(ref("a"))
    arena.evict(ref("a"))

    with pytest.raises(KeyError):
        arena.adapter(Revision("a"))


def test_move_onto_its_own_bytes_keeps_the_content() -> None:
    arena, weights = DeviceArena(CPU, 4096, torch.float32), host_copy(rank=5, fill=7.0)
    arena.write(AdapterWrite(ref("a"), 64, weights.run.nbytes), weights)
    arena.write(AdapterWrite(ref("a"), 0, weights.run.nbytes, moved_from=64), None)

    torch.testing.assert_close(
        arena.adapter(Revision("a")).linears[TargetId(0)].a, weights.run[:20].view(5, 4)
    )


def replay(arena: Arena, capacity: int, seed: int) -> None:
    """Place adapters of random ranks in random order; every view equals the host copy at all times."""
    chance = random.Random(seed)
    placement = AdapterPlacement(capacity)
    copies = {f"a{i}": host_copy(chance.choice([1, 3, 8]), float(i * 1000)) for i in range(12)}
    for _ in range(120):
        name = chance.choice(list(copies))
        if not placement.is_resident(ref(name)):
            placed = placement.place(ref(name), copies[name].run.nbytes)
            assert placed is not None
            for evicted in placed.evicted:
                arena.evict(evicted)
            for write in placed.writes:
                arena.write(write, copies[write.ref.name] if write.moved_from is None else None)
        for resident in placement.resident():
            for target, entry in copies[resident.name].layout.entries.items():
                a = arena.adapter(resident.revision).linears[target].a
                expected = copies[resident.name].run[entry.offset_a :][: a.numel()]
                torch.testing.assert_close(a.flatten().cpu(), expected)


@pytest.mark.parametrize("seed", range(4))
def test_random_placements_keep_every_view_right(seed: int) -> None:
    replay(DeviceArena(CPU, 2048, torch.float32), 2048, seed)
    replay(HostArena(), 2048, seed)


@pytest.mark.gpu
def test_random_placements_keep_every_view_right_on_the_gpu() -> None:
    device = torch.device("cuda")
    replay(make_arena(device, 2048, torch.float32), 2048, seed=0)
