"""Packing is spread over steps, and finished whatever else is loaded and evicted meanwhile."""

import pytest
import torch

from adapters.batch import LoraBatch
from adapters.device import HostArena
from adapters.kernels import packs
from adapters.kernels.choice import BFLOAT16_COSTS, AdapterSize, Demand, PackSize
from adapters.kernels.cpu import CpuKernel
from adapters.types import AdapterRef, AdapterUse, Revision, TargetId
from adapters.weights import LoraWeights
from tests.adapters.making import made_weights, put

NUM_TARGETS = 168


def made(number: int) -> LoraWeights:
    shapes = dict.fromkeys(range(NUM_TARGETS), (2, 8, 8))
    return made_weights(f"a{number:02d}", shapes, dtype=torch.bfloat16, seed=number)


def kernel_and_arena(adapters: list[LoraWeights]) -> tuple[CpuKernel, HostArena]:
    kernel = CpuKernel(torch.bfloat16, 1 << 24)
    arena = HostArena(kernel)
    for weights in adapters:
        put(arena, weights)
    return kernel, arena


def one_token_each(arena: HostArena, adapters: list[LoraWeights]) -> LoraBatch:
    uses = [AdapterUse.of(AdapterRef(weights.revision, weights.revision)) for weights in adapters]
    batch = LoraBatch.build(arena, [(use, 1) for use in uses])
    assert batch is not None
    return batch


def decode(arena: HostArena, adapters: list[LoraWeights]) -> None:
    batch = one_token_each(arena, adapters)
    x = torch.ones(len(adapters), 8, dtype=torch.bfloat16)
    batch.add_lora(torch.zeros_like(x), x, TargetId(0))


def test_no_step_packs_for_longer_than_a_quarter_of_its_adapters_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[int] = []
    build = packs.PackBuilder.build

    def noting(builder: packs.PackBuilder, num_targets: int, adapters: packs.Adapters) -> packs.Pack | None:
        built.append(num_targets)
        return build(builder, num_targets, adapters)

    monkeypatch.setattr(packs.PackBuilder, "build", noting)
    adapters = [made(number) for number in range(16)]
    kernel, arena = kernel_and_arena(adapters)
    linears = {weights.revision: arena.adapter(weights.revision).linears for weights in adapters}
    sizes = {revision: AdapterSize.of(targets) for revision, targets in linears.items()}
    packing_us = BFLOAT16_COSTS.packing_us(PackSize.of(sizes, sizes))
    batch = one_token_each(arena, adapters)
    apart_us = BFLOAT16_COSTS.choose(Demand.of(batch.groups), [], sizes).us

    while not kernel.num_pack_bytes and len(built) < 50:
        decode(arena, adapters)

    assert kernel.num_pack_bytes
    assert 1 < len(built) < 8
    assert max(built) * packing_us <= apart_us / 4


def test_eviction_of_others_does_not_begin_the_packing_anew() -> None:
    """As while cold adapters come and go beside the streams of a lasting set."""
    adapters = [made(number) for number in range(16)]
    kernel, arena = kernel_and_arena(adapters)

    for number in range(100, 120):
        passer_by = made(number)
        put(arena, passer_by)
        decode(arena, [passer_by])  # the kernel only forgets what it knew
        decode(arena, adapters)
        arena.evict(AdapterRef(passer_by.revision, Revision(passer_by.revision)))

    assert kernel.num_pack_bytes
