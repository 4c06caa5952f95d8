"""Which adapters share a pack, at the size of a real model (24 layers, 168 targets, rank 16)."""

import random

import pytest

from adapters.batch import LoraGroup
from adapters.kernels.choice import BFLOAT16_COSTS, AdapterSize, Demand, PackSize
from adapters.types import Revision

SIZE = AdapterSize(num_parameters=8_800_000, num_targets=168, rank=16)
ROOM = 2**30


def demands(*num_tokens: int) -> list[Demand]:
    """Adapters a00, a01, ... with so many adjacent tokens each."""
    made, start = [], 0
    for index, count in enumerate(num_tokens):
        made.append(
            LoraGroup(name(index), 1.0, count, ((start, start + count),), slice(start, start + count))
        )
        start += count
    return Demand.of(made)


def name(index: int) -> Revision:
    return Revision(f"a{index:02}")


def sizes(count: int) -> dict[Revision, AdapterSize]:
    return {name(index): SIZE for index in range(count)}


def best(step: list[Demand], room: int = ROOM) -> tuple[list[tuple[Revision, ...]], list[Revision]]:
    known = sizes(len(step))
    choice = BFLOAT16_COSTS.choose(step, BFLOAT16_COSTS.partition(step, known, room), known)
    return [pack.members for pack in choice.packs], choice.apart


def test_many_adapters_with_a_token_each_share_a_pack() -> None:
    packs, apart = best(demands(*[1] * 16))

    assert packs == [tuple(name(index) for index in range(16))]
    assert not apart


def test_one_adapter_is_computed_apart() -> None:
    assert best(demands(16)) == ([], [name(0)])


def test_one_adapter_in_scattered_rows_is_worth_a_pack() -> None:
    scattered = LoraGroup(name(0), 1.0, 2, ((0, 1), (2, 3)), slice(0, 3))

    assert best(Demand.of([scattered])) == ([(name(0),)], [])


def test_an_adapter_at_two_scales_is_one_demand() -> None:
    parts = [
        LoraGroup(name(0), 0.5, 3, ((0, 1), (4, 6)), slice(0, 6)),
        LoraGroup(name(0), 1.0, 2, ((1, 2), (9, 10)), slice(0, 10)),
        LoraGroup(name(1), 1.0, 1, ((2, 3),), slice(2, 3)),
    ]

    both, other = Demand.of(parts)

    assert (both.revision, both.num_tokens, both.spans) == (name(0), 5, ((0, 2), (4, 6), (9, 10)))
    assert both.groups == tuple(parts[:2])
    assert other.groups == (parts[2],)


def test_prefill_is_computed_apart_from_those_that_decode() -> None:
    packs, apart = best(demands(*[1] * 15, 512))

    assert packs == [tuple(name(index) for index in range(15))]
    assert apart == [name(15)]


def test_prefill_over_a_few_adapters_packs_nothing() -> None:
    assert best(demands(200, 200, 112))[0] == []


def test_packs_are_bounded_in_rank_and_in_room() -> None:
    packs, _ = best(demands(*[1] * 64))
    assert max(len(pack) for pack in packs) * SIZE.rank <= 512

    packs, _ = best(demands(*[1] * 16), room=4 * SIZE.num_parameters)
    assert {len(pack) for pack in packs} == {4}

    assert best(demands(*[1] * 16), room=SIZE.num_parameters - 1)[0] == []


def test_superset_serves_a_subset_until_it_wastes_too_much() -> None:
    known = sizes(16)
    full = PackSize.of(known, known)

    assert full in BFLOAT16_COSTS.choose(demands(*[1] * 8), [full], known).packs
    assert full not in BFLOAT16_COSTS.choose(demands(1), [full], known).packs


@pytest.mark.parametrize("seed", range(10))
def test_everybody_is_served_once_and_the_order_of_the_rows_does_not_matter(seed: int) -> None:
    chance = random.Random(seed)
    step = demands(*(chance.choice([1, 1, 1, 4, 100]) for _ in range(20)))
    known = sizes(20)
    candidates = [PackSize.of(chance.sample(list(known), 5), known) for _ in range(6)]
    choice = BFLOAT16_COSTS.choose(step, candidates, known)

    served = [revision for pack in choice.packs.values() for revision in pack]
    assert sorted([*served, *choice.apart]) == sorted(known)
    assert choice.us <= BFLOAT16_COSTS.choose(step, [], known).us
    ordered = BFLOAT16_COSTS.partition(step, known, ROOM)
    chance.shuffle(step)
    assert BFLOAT16_COSTS.partition(step, known, ROOM) == ordered
