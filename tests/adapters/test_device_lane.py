"""Copies beside the steps: whenever the device carries them out, nobody sees a run that is not whole."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapters.device import Arena, DeviceArena, HostArena, SideStream
from adapters.placement import AdapterPlacement
from adapters.types import AdapterRef, AdapterWrite, Revision, TargetId
from adapters.weights import LoraWeights
from tests.adapters.making import made_weights

CPU = torch.device("cpu")
CAPACITY = 4096


class SlowLane:
    """Carries copies out in order, at any time between their beginning and the first wait for them."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._open: list[tuple[int, Tensor, Tensor]] = []
        self._num_begun = 0

    def begin(self, target: Tensor, source: Tensor) -> object:
        self._num_begun += 1
        self._open.append((self._num_begun, target, source))
        return self._num_begun

    def wait(self, ticket: object) -> None:
        while self._open and self._open[0][0] <= ticket:  # type: ignore[operator]
            self._carry_out_one()

    def pass_time(self) -> None:
        """Some copies more."""
        for _ in range(self._chance.randrange(len(self._open) + 1)):
            self._carry_out_one()

    def finish(self) -> None:
        """All that were begun."""
        while self._open:
            self._carry_out_one()

    def _carry_out_one(self) -> None:
        _, target, source = self._open.pop(0)
        target.copy_(source)


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, Revision(name))


def made(name: str, rank: int, seed: int) -> LoraWeights:
    return made_weights(name, {0: (rank, 8, 16), 2: (rank, 16, 8)}, seed=seed)


def one_lane_arena(seed: int = 0) -> tuple[DeviceArena, SlowLane]:
    lane = SlowLane(random.Random(seed))
    return DeviceArena(CPU, CAPACITY, torch.float32, lane=lane), lane


A, B = made("a", 2, seed=1), made("b", 2, seed=2)


def assert_has(arena: Arena, *adapters: LoraWeights) -> None:
    """As a kernel sees them."""
    for weights in adapters:
        for target in (TargetId(0), TargetId(2)):
            found = arena.adapter(weights.revision).linears[target]
            expected = weights.view(target)
            assert expected is not None
            assert torch.equal(found.a.cpu(), expected[0])
            assert torch.equal(found.b.cpu(), expected[1])


def at(weights: LoraWeights, offset: int, moved_from: int | None = None) -> AdapterWrite:
    return AdapterWrite(ref(weights.revision), offset, weights.num_bytes, moved_from)


def test_prefetched_adapter_may_be_used_without_further_orders() -> None:
    arena, _ = one_lane_arena()

    arena.prefetch(at(A, 64), A)

    assert_has(arena, A)


def test_write_of_a_prefetched_adapter_copies_nothing_again() -> None:
    arena, _ = one_lane_arena()
    arena.prefetch(at(A, 64), A)

    arena.write(at(A, 64), None)

    assert_has(arena, A)


def test_prefetch_to_another_place_leaves_the_first_alone() -> None:
    """As after a step that failed: others may be moved to the first place by then."""
    arena, lane = one_lane_arena()
    arena.write(at(B, 2048), B)
    arena.prefetch(at(A, 0), A)
    arena.prefetch(at(A, 1024), A)
    arena.write(at(B, 0, moved_from=2048), None)
    lane.finish()

    assert_has(arena, A, B)


def test_write_to_another_place_does_not_rely_on_the_prefetch() -> None:
    arena, _ = one_lane_arena()
    arena.prefetch(at(A, 0), A)
    arena.write(at(A, 1024), A)
    arena.write(at(B, 0), B)

    assert_has(arena, A, B)


def test_prefetch_of_an_adapter_that_was_evicted_leaves_its_room_alone() -> None:
    arena, lane = one_lane_arena()
    arena.write(at(B, 2048), B)
    arena.prefetch(at(A, 0), A)
    arena.evict(ref("a"))
    arena.write(at(B, 0, moved_from=2048), None)
    lane.finish()

    assert_has(arena, B)
    with pytest.raises(KeyError):
        arena.adapter(Revision("a"))


def test_run_that_is_on_its_way_can_be_moved() -> None:
    arena, _ = one_lane_arena()
    arena.prefetch(at(A, 256), A)
    arena.write(at(A, 0, moved_from=256), None)
    arena.prefetch(at(B, 1024), B)

    assert_has(arena, A, B)


def test_host_arena_has_what_was_prefetched() -> None:
    arena = HostArena()

    arena.prefetch(at(A, 0), A)

    assert_has(arena, A)
    assert arena.adapter(A.revision).linears[TargetId(0)].a.data_ptr() == A.run.data_ptr()


def replay(arena: Arena, chance: random.Random, num_steps: int) -> Iterator[None]:
    """Place adapters of random sizes; each arrives by a write or by a prefetch, and is used then or later."""
    placement = AdapterPlacement(CAPACITY)
    copies = {f"a{i}": made(f"a{i}", chance.choice([1, 2, 5]), seed=i) for i in range(12)}
    for _ in range(num_steps):
        weights = copies[chance.choice(list(copies))]
        if not placement.is_resident(ref(weights.revision)):
            placed = placement.place(ref(weights.revision), weights.num_bytes)
            assert placed is not None
            for evicted in placed.evicted:
                arena.evict(evicted)
            for write in placed.writes:
                held = copies[write.ref.name]
                if write.moved_from is not None:
                    arena.write(write, None)
                elif chance.random() < 0.7:
                    arena.prefetch(write, held)
                else:
                    arena.write(write, held)
        yield
        for resident in placement.resident():
            if chance.random() < 0.3:
                assert_has(arena, copies[resident.name])
    assert_has(arena, *(copies[resident.name] for resident in placement.resident()))


@pytest.mark.parametrize("seed", range(20))
def test_random_placements_are_right_whenever_copies_are_carried_out(seed: int) -> None:
    arena, lane = one_lane_arena(seed)
    for _ in replay(arena, random.Random(seed), 150):
        lane.pass_time()


# --- On a device that does several things at once ---------------------------------------------------------

LONG = 200_000_000  # cycles of a GPU: about a tenth of a second
BIG = 64 << 20


def cuda_arena() -> DeviceArena:
    return DeviceArena(torch.device("cuda"), BIG, torch.float32)


def page_locked(value: float) -> LoraWeights:
    """An adapter that fills the arena."""
    side = 2048
    weights = made_weights(str(value), {0: (side, side, 3 * side)})
    return replace(weights, run=torch.full_like(weights.run, value).pin_memory())


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_random_placements_are_right_on_the_gpu(seed: int) -> None:
    arena = DeviceArena(torch.device("cuda"), CAPACITY, torch.float32)
    for _ in replay(arena, random.Random(seed), 150):
        pass


@pytest.mark.gpu
def test_copy_runs_while_the_gpu_computes() -> None:
    weights, lane = page_locked(1.0), SideStream(torch.device("cuda"))
    arena = DeviceArena(torch.device("cuda"), BIG, torch.float32, lane=lane)
    arena.prefetch(at(weights, 0), weights)
    torch.cuda._sleep(20 * LONG)
    computed = torch.cuda.current_stream().record_event()

    lane._stream.synchronize()

    assert not computed.query(), "the copy waited for what was computed beside it"
    torch.cuda.synchronize()
    assert_first_is(arena, weights, 1.0)


@pytest.mark.gpu
def test_copy_does_not_overwrite_what_an_earlier_step_still_reads() -> None:
    arena, old, new = cuda_arena(), page_locked(1.0), page_locked(2.0)
    arena.write(at(old, 0), old)
    a = arena.adapter(old.revision).linears[TargetId(0)].a
    torch.cuda.synchronize()

    torch.cuda._sleep(LONG)
    read = a.clone()  # late
    arena.evict(ref(old.revision))
    arena.prefetch(at(new, 0), new)

    assert_first_is(arena, new, 2.0)
    assert read.eq(1.0).all()


@pytest.mark.gpu
def test_what_uses_the_adapter_comes_after_its_copy() -> None:
    arena, weights = cuda_arena(), page_locked(3.0)
    torch.cuda._sleep(LONG)  # the copy cannot have begun when it is asked for
    arena.prefetch(at(weights, 0), weights)

    assert_first_is(arena, weights, 3.0)


@pytest.mark.gpu
def test_host_copy_may_be_dropped_as_soon_as_its_copying_was_ordered() -> None:
    arena, weights = cuda_arena(), page_locked(4.0)
    torch.cuda._sleep(LONG)
    arena.prefetch(at(weights, 0), weights)
    revision = weights.revision
    del weights
    reused = [torch.full((BIG // 4,), 5.0).pin_memory() for _ in range(2)]  # would get the same memory

    assert arena.adapter(revision).linears[TargetId(0)].a.eq(4.0).all()
    assert all(tensor.eq(5.0).all() for tensor in reused)


def assert_first_is(arena: DeviceArena, weights: LoraWeights, value: float) -> None:
    assert arena.adapter(weights.revision).linears[TargetId(0)].a.eq(value).all()
