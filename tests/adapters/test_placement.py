"""The bookkeeping of the arena, replayed on bytes: no run is overwritten, moved wrongly or evicted in use."""

import random

import pytest

from adapters.placement import AdapterPlacement
from adapters.types import AdapterRef, Placed, Revision

CAPACITY = 1024


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, Revision(f"rev-{name}"))


def placed(placement: AdapterPlacement, name: str, num_bytes: int) -> Placed:
    answer = placement.place(ref(name), num_bytes)
    assert answer is not None
    return answer


def test_first_adapters_lie_side_by_side_and_aligned() -> None:
    placement = AdapterPlacement(CAPACITY, alignment=64)

    offsets = [placed(placement, name, 100).writes[0].offset for name in "abc"]

    assert offsets == [0, 128, 256]
    assert [ref.name for ref in placement.resident()] == ["a", "b", "c"]


def test_longest_idle_adapter_is_evicted_first() -> None:
    placement = AdapterPlacement(CAPACITY, alignment=64)
    for name in "abcd":
        placed(placement, name, 256)
    for name in "badc":
        placement.acquire(ref(name))
        placement.release(ref(name))

    assert placed(placement, "e", 300).evicted == (ref("b"), ref("a"))


def test_adapters_in_use_are_never_evicted() -> None:
    placement = AdapterPlacement(CAPACITY, alignment=64)
    for name in "ab":
        placed(placement, name, 512)
        placement.acquire(ref(name))

    assert placement.place(ref("c"), 64) is None
    placement.release(ref("a"))
    assert placed(placement, "c", 64).evicted == (ref("a"),)


def test_adapters_that_are_to_be_kept_are_not_evicted() -> None:
    placement = AdapterPlacement(CAPACITY, alignment=64)
    for name in "ab":
        placed(placement, name, 512)
    kept = {Revision("rev-a")}

    assert placement.has_room([512], kept)
    assert not placement.has_room([512, 1], kept)
    assert placement.place(ref("c"), 1024, kept) is None
    answer = placement.place(ref("c"), 512, kept)

    assert answer is not None
    assert answer.evicted == (ref("b"),)


def test_room_for_several_is_what_is_free_or_idle_rounded_up_for_each() -> None:
    placement = AdapterPlacement(CAPACITY, alignment=64)
    placed(placement, "busy", 512)
    placement.acquire(ref("busy"))
    placed(placement, "idle", 256)

    assert placement.has_room([256, 1, 65])
    assert not placement.has_room([256, 1, 193])


def test_refused_placement_changes_nothing() -> None:
    placement = AdapterPlacement(CAPACITY, alignment=64)
    placed(placement, "idle", 256)
    placed(placement, "busy", 512)
    placement.acquire(ref("busy"))

    assert placement.place(ref("large"), 1024) is None
    assert placement.resident() == (ref("idle"), ref("busy"))


def test_scattered_free_bytes_are_slid_together_as_far_as_needed() -> None:
    placement = AdapterPlacement(CAPACITY, alignment=64)
    for name in "abcd":
        placed(placement, name, 256)
    for name in "bd":
        placement.acquire(ref(name))

    answer = placed(placement, "e", 512)

    assert answer.evicted == (ref("a"), ref("c"))
    assert [(write.ref.name, write.moved_from, write.offset) for write in answer.writes] == [
        ("b", 256, 0),
        ("e", None, 256),
    ]


def test_gap_is_filled_without_moving_anybody() -> None:
    placement = AdapterPlacement(CAPACITY, alignment=64)
    for name, size in (("a", 64), ("b", 192), ("c", 512), ("d", 256)):
        placed(placement, name, size)
    for name in "acd":
        placement.acquire(ref(name))

    answer = placed(placement, "e", 192)

    assert answer.evicted == (ref("b"),)
    assert [(write.moved_from, write.offset) for write in answer.writes] == [(None, 64)]


def test_two_names_of_one_revision_share_a_run() -> None:
    placement = AdapterPlacement(CAPACITY)
    first, second = AdapterRef("x", Revision("same")), AdapterRef("y", Revision("same"))
    placement.place(first, 100)

    placement.acquire(second)

    assert placement.is_resident(second)
    assert placement.users(first) == 1


def test_what_is_larger_than_the_arena_never_fits() -> None:
    placement = AdapterPlacement(1000, alignment=64)

    assert placement.fits(960)
    assert not placement.fits(961)
    assert placement.place(ref("large"), 961) is None


@pytest.mark.parametrize("seed", range(12))
def test_random_worlds_keep_every_byte_where_it_belongs(seed: int) -> None:
    """The orders are carried out on a bytearray; after each one every resident run holds its own letter."""
    chance = random.Random(seed)
    placement = AdapterPlacement(4096, alignment=chance.choice([1, 16, 64]))
    memory = bytearray(4096)
    where: dict[Revision, tuple[int, int, int]] = {}  # offset, bytes, letter
    held: list[AdapterRef] = []
    for _ in range(1500):
        action = chance.random()
        if action < 0.35 and held:
            placement.release(held.pop(chance.randrange(len(held))))
        elif action < 0.6 and placement.resident():
            chosen = chance.choice(placement.resident())
            placement.acquire(chosen)
            held.append(chosen)
        else:
            _place_one(placement, memory, where, held, ref(str(chance.randrange(60))), chance)
        placement.check()
        assert {ref.revision for ref in placement.resident()} == set(where)
        assert {ref.revision for ref in held} <= set(where)
        for offset, num_bytes, letter in where.values():
            assert memory[offset : offset + num_bytes] == bytes([letter]) * num_bytes


def _place_one(
    placement: AdapterPlacement,
    memory: bytearray,
    where: dict[Revision, tuple[int, int, int]],
    held: list[AdapterRef],
    wanted: AdapterRef,
    chance: random.Random,
) -> None:
    num_bytes = chance.choice([1, 17, 64, 200, 900, 2000])
    if placement.is_resident(wanted):
        return
    idle = {ref.revision for ref in placement.resident()} - {ref.revision for ref in held}
    kept = set(chance.sample(sorted(idle), chance.randint(0, len(idle)))) if chance.random() < 0.3 else set()
    idle -= kept
    has_room = placement.has_room([num_bytes], kept)
    answer = placement.place(wanted, num_bytes, kept)
    assert (answer is not None) is has_room
    if answer is None:
        return
    assert {ref.revision for ref in answer.evicted} <= idle
    for evicted in answer.evicted:
        del where[evicted.revision]
    for write in answer.writes:
        if write.moved_from is None:
            letter = chance.randrange(256)
            memory[write.offset : write.offset + write.num_bytes] = bytes([letter]) * write.num_bytes
        else:
            _, _, letter = where[write.ref.revision]
            memory[write.offset : write.offset + write.num_bytes] = memory[
                write.moved_from : write.moved_from + write.num_bytes
            ]
        where[write.ref.revision] = (write.offset, write.num_bytes, letter)
