"""Every kernel computes what reference.py says, for every popularity of adapters, rank and size."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from adapters.batch import LoraBatch
from adapters.device import DeviceArena, HostArena
from adapters.kernels import LoraKernel
from adapters.kernels.groups import GroupKernel
from adapters.kernels.native.compiled import INSTRUCTION_SETS
from adapters.kernels.reference import ReferenceKernel
from adapters.types import AdapterRef, AdapterUse, TargetId
from adapters.weights import LoraWeights
from tests.adapters.making import made_kernel, made_weights, put, use_of

MIXES = ("one", "distinct", "uniform", "zipf", "skewed", "with_base", "only_base")
SIZES = ((1, 8, 8), (7, 33, 17), (33, 64, 48), (19, 200, 333))  # tokens, in, out
TARGETS = 3
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
KERNELS = (*INSTRUCTION_SETS, "groups")


def adapters_of(ranks: Sequence[int], num_in: int, num_out: int, dtype: torch.dtype) -> list[LoraWeights]:
    """Adapters that lack a target each, and whose ranks differ from target to target."""
    return [
        made_weights(
            f"r{index:02}",
            {t: (rank + t, num_in, num_out) for t in range(TARGETS) if (index + t) % 4 != 3},
            dtype=dtype,
            seed=index,
        )
        for index, rank in enumerate(ranks)
    ]


def owners(mix: str, num_tokens: int, num_adapters: int, seed: int) -> list[int | None]:
    """Adapter of each token."""
    chance = random.Random(seed)
    draw = {
        "one": lambda i: 0,
        "distinct": lambda i: i % num_adapters,
        "uniform": lambda i: chance.randrange(num_adapters),
        "zipf": lambda i: min(int(1 / (chance.random() + 1e-9)) - 1, num_adapters - 1),
        "skewed": lambda i: 0 if i * 10 < num_tokens * 9 else 1 % num_adapters,
        "with_base": lambda i: chance.choice([None, *range(num_adapters)]),
        "only_base": lambda i: None,
    }[mix]
    return [draw(i) for i in range(num_tokens)]


def rows(
    adapters: Sequence[LoraWeights], owners: Sequence[int | None]
) -> list[tuple[AdapterUse | None, int]]:
    return [(None if owner is None else use_of(adapters[owner].revision), 1) for owner in owners]


def arena(kernel: LoraKernel, adapters: Sequence[LoraWeights]) -> HostArena:
    made = HostArena(kernel)
    for weights in adapters:
        put(made, weights)
    return made


def assert_equals_reference(
    kernel_arena: HostArena | DeviceArena,
    adapters: Sequence[LoraWeights],
    step: Sequence[tuple[AdapterUse | None, int]],
    sizes: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(count for _, count in step)
    x = torch.randn(num_tokens, sizes[0], generator=generator).to(dtype)
    y = torch.randn(num_tokens, sizes[1], generator=generator).to(dtype)
    batch = LoraBatch.build(kernel_arena, step)
    oracle = LoraBatch.build(arena(ReferenceKernel(), adapters), step)
    if batch is None or oracle is None:
        assert all(use is None for use, _ in step)
        return
    for target in range(TARGETS):
        expected = oracle.add_lora(y.clone(), x, TargetId(target))
        got = batch.add_lora(y.clone(), x, TargetId(target))
        largest = float(expected.abs().max())
        torch.testing.assert_close(
            got.float(), expected.float(), rtol=0, atol=TOLERANCE[dtype] * max(largest, 1.0)
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [[1], [8, 8, 8, 8], [4, 16, 64, 5, 32, 3]], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_kernel_equals_reference(mix: str, ranks: list[int], dtype: torch.dtype, kernel: str) -> None:
    for seed, (num_tokens, num_in, num_out) in enumerate(SIZES):
        adapters = adapters_of(ranks, num_in, num_out, dtype)
        step = rows(adapters, owners(mix, num_tokens, len(ranks), seed))
        kernel_arena = arena(made_kernel(kernel, dtype), adapters)
        assert_equals_reference(kernel_arena, adapters, step, (num_in, num_out), dtype, seed)


@pytest.mark.parametrize("mix", MIXES)
def test_group_kernel_equals_reference_over_a_device_arena(mix: str) -> None:
    for seed, (num_tokens, num_in, num_out) in enumerate(SIZES):
        adapters = adapters_of([4, 16, 1, 7], num_in, num_out, torch.float32)
        device_arena = device_arena_of(torch.device("cpu"), adapters)
        step = rows(adapters, owners(mix, num_tokens, 4, seed))
        assert_equals_reference(device_arena, adapters, step, (num_in, num_out))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(5))
def test_kernel_is_right_while_sets_come_and_go(seed: int, kernel: str) -> None:
    """Random worlds: joins, leaves, prefill among decode, adapters that leave and come back elsewhere."""
    chance = random.Random(seed)
    adapters = adapters_of([chance.choice([1, 4, 8, 16]) for _ in range(10)], 24, 20, torch.float32)
    kernel_arena = arena(made_kernel(kernel), adapters)
    running: list[int | None] = []
    for step_number in range(60):
        if chance.random() < 0.3:
            running.append(chance.choice([None, *range(10)]))
        if running and chance.random() < 0.2:
            running.pop(chance.randrange(len(running)))
        if chance.random() < 0.2:
            number = chance.randrange(10)
            old = adapters[number]
            kernel_arena.evict(AdapterRef(old.revision, old.revision))
            adapters[number] = replace(old, run=old.run.clone())
            put(kernel_arena, adapters[number])
            old.run.fill_(torch.nan)
        step = rows(adapters, running)
        if chance.random() < 0.3:
            prefill = use_of(adapters[chance.randrange(10)].revision)
            step.insert(chance.randrange(len(step) + 1), (prefill, chance.randrange(1, 70)))
        if step:
            assert_equals_reference(kernel_arena, adapters, step, (24, 20), seed=step_number)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(5))
def test_tokens_with_several_scaled_adapters_get_the_sum(kernel: str, seed: int) -> None:
    chance = random.Random(seed)
    adapters = adapters_of([4, 8, 3, 16], 24, 20, torch.float32)
    names = [weights.revision for weights in adapters]
    uses: list[AdapterUse | None] = [None, *(use_of(name) for name in names)]
    for _ in range(3):
        scales = [chance.choice([0.25, 1.0, -2.0, 3.0]) for _ in names]
        uses.append(use_of(*chance.sample(names, 3), scales=scales[:3]))
    step = [(chance.choice(uses), chance.choice([1, 1, 5])) for _ in range(12)]
    kernel_arena = arenas_by_kernel(kernel, adapters)
    assert_equals_reference(kernel_arena, adapters, step, (24, 20))


def with_extras(ranks: Sequence[int], num_in: int, num_out: int, dtype: torch.dtype) -> list[LoraWeights]:
    """In turn plain ones, such with a bias, with a gain, and with both."""
    return [
        made_weights(
            f"x{index:02}",
            {t: (rank + t, num_in, num_out) for t in range(TARGETS) if (index + t) % 5 != 4},
            dtype=dtype,
            seed=index,
            has_gain=index % 4 >= 2,
            has_bias=index % 2 == 1,
        )
        for index, rank in enumerate(ranks)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mix", MIXES)
def test_gains_and_biases(mix: str, dtype: torch.dtype, kernel: str) -> None:
    for seed, (num_tokens, num_in, num_out) in enumerate(SIZES):
        adapters = with_extras([4, 8, 1, 5, 3, 16, 2, 7], num_in, num_out, dtype)
        step = rows(adapters, owners(mix, num_tokens, len(adapters), seed))
        kernel_arena = arena(made_kernel(kernel, dtype), adapters)
        assert_equals_reference(kernel_arena, adapters, step, (num_in, num_out), dtype, seed)


@pytest.mark.parametrize("kernel", [*KERNELS, "device"])
@pytest.mark.parametrize("seed", range(8))
def test_random_mixes_of_every_kind_at_every_scale(kernel: str, seed: int) -> None:
    """A token of several adapters uses none with a gain, whose base would no longer be the base's answer."""
    chance = random.Random(seed)
    adapters = with_extras([chance.choice([1, 4, 8, 16]) for _ in range(8)], 24, 20, torch.float32)
    names = [weights.revision for weights in adapters]
    without_gain = [name for index, name in enumerate(names) if index % 4 < 2]
    kernel_arena = arenas_by_kernel(kernel, adapters)
    running: list[AdapterUse | None] = []
    for step_number in range(25):
        for _ in range(chance.randrange(3)):
            scales = [chance.choice([0.0, 0.25, 1.0, -2.0]) for _ in names]
            several = use_of(*chance.sample(without_gain, 3), scales=scales[:3])
            single = use_of(chance.choice(names), scales=scales[3:4])
            running.append(chance.choice([None, use_of(chance.choice(names)), single, several]))
        if len(running) > 12:
            del running[: chance.randrange(8)]
        step = [(use, 1) for use in running]
        if chance.random() < 0.3:
            step.insert(
                chance.randrange(len(step) + 1), (use_of(chance.choice(names)), chance.randrange(1, 40))
            )
        if step:
            assert_equals_reference(kernel_arena, adapters, step, (24, 20), seed=step_number)


def arenas_by_kernel(kernel: str, adapters: Sequence[LoraWeights]) -> HostArena | DeviceArena:
    if kernel == "device":
        return device_arena_of(torch.device("cpu"), adapters)
    return arena(made_kernel(kernel), adapters)


def device_arena_of(device: torch.device, adapters: Sequence[LoraWeights]) -> DeviceArena:
    made, offset = DeviceArena(device, 1 << 20, adapters[0].run.dtype, GroupKernel()), 0
    for weights in adapters:
        put(made, weights, offset)
        offset += weights.num_bytes
    return made


@pytest.mark.parametrize("kernel", INSTRUCTION_SETS)
def test_values_that_are_no_numbers_stay_with_their_own_tokens(kernel: str) -> None:
    """An adapter whose answers overflow disturbs nobody else in the batch."""
    adapters = adapters_of([4] * 4, 24, 20, torch.float32)
    adapters[0].run.fill_(3e38)
    kernel_arena = arena(made_kernel(kernel), adapters)
    x, y = torch.full((5, 24), 1e6), torch.zeros(5, 20)
    batch = LoraBatch.build(kernel_arena, rows(adapters, [0, 1, 2, 3, None]))
    assert batch is not None

    got = batch.add_lora(y, x, TargetId(1))

    assert not got[0].isfinite().any()
    assert got[1:].isfinite().all()
    assert got[4].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", INSTRUCTION_SETS)
def test_a_token_has_the_same_bits_in_any_company_on_any_threads(kernel: str, dtype: torch.dtype) -> None:
    num_in, num_out = 200, 333
    adapters = adapters_of([16, 5, 8], num_in, num_out, dtype)
    kernel_arena = arena(made_kernel(kernel, dtype), adapters)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(23, n, generator=generator).to(dtype) for n in (num_in, num_out))
    theirs = owners("uniform", 23, 3, seed=1)
    alone = []
    for token, owner in enumerate(theirs):
        batch = LoraBatch.build(kernel_arena, rows(adapters, [owner]))
        assert batch is not None
        alone.append(batch.add_lora(y[token : token + 1].clone(), x[token : token + 1], TargetId(0)))
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        batch = LoraBatch.build(kernel_arena, rows(adapters, theirs))
        assert batch is not None
        together = batch.add_lora(y.clone(), x, TargetId(0))
        torch.set_num_threads(threads)
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES)
def test_group_kernel_equals_reference_on_the_gpu(mix: str) -> None:
    device = torch.device("cuda")
    adapters = [
        *adapters_of([4, 16, 1, 7], 64, 48, torch.float32),
        *with_extras([3] * 4, 64, 48, torch.float32),
    ]
    step = rows(adapters, owners(mix, 33, len(adapters), seed=0))
    x, y = torch.randn(33, 64), torch.randn(33, 48)
    batch = LoraBatch.build(device_arena_of(device, adapters), step)
    oracle = LoraBatch.build(arena(ReferenceKernel(), adapters), step)
    if batch is None or oracle is None:
        assert mix == "only_base"
        return
    got = batch.add_lora(y.to(device), x.to(device), TargetId(0)).cpu()
    torch.testing.assert_close(got, oracle.add_lora(y.clone(), x, TargetId(0)), rtol=1e-4, atol=1e-4)
