"""Our own attention kernels against attention written out, and against themselves in other company."""

import random
from copy import copy

import pytest
import torch
from torch import Tensor

from adapters.kernels.native.compiled import INSTRUCTION_SETS
from server.model.attention import LayerSpec
from server.model.native.attention import NativeAttention, can_attend
from server.model.native.bindings import KernelsMissing, load_kernels
from tests.server.model.test_attention import World, attend_last

SPECS = {
    "grouped": (14, LayerSpec(2, 64, 64, None, None)),
    "one-head-each": (3, LayerSpec(3, 16, 16, None, None)),
    "one-kv-head": (15, LayerSpec(1, 128, 128, None, None)),
    "window": (8, LayerSpec(2, 32, 32, 37, None)),
    "short-window": (4, LayerSpec(4, 16, 16, 3, None)),
    "latent": (4, LayerSpec(4, 48, 32, None, None)),
    "wide": (2, LayerSpec(1, 256, 256, None, None)),
}


TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-5}


@pytest.fixture(scope="module", params=TOLERANCE, ids=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["numbers", "bytes"])
def has_bytes(request: pytest.FixtureRequest) -> bool:
    """Of the cache."""
    return request.param


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest, dtype: torch.dtype, has_bytes: bool) -> NativeAttention:
    try:
        return NativeAttention(load_kernels(dtype, (request.param,)), has_bytes=has_bytes)
    except KernelsMissing as missing:
        pytest.skip(str(missing))


def world(
    kernels: NativeAttention, lengths: list[int], name: str, *, seed: int, block_size: int = 16
) -> World:
    num_heads, spec = SPECS[name]
    made = World(
        lengths,
        spec,
        seed=seed,
        dtype=kernels.dtype,
        kernels=kernels,
        block_size=block_size,
        num_heads=num_heads,
    )
    for operands in (made.q, made.k, made.v):
        operands[:] = [operand.to(kernels.dtype).float() for operand in operands]  # as the kernel sees them
    return made


def as_read_back(world: World) -> World:
    """With the keys and values that come out of the cache. Nothing can be computed with it."""
    read = copy(world)
    if world.kernels.cache_dtype(world.dtype) is torch.int8:
        read.k, read.v = ([in_eight_bits(operand) for operand in operands] for operands in (world.k, world.v))
    return read


def in_eight_bits(operand: Tensor) -> Tensor:
    """[n, heads, dim], each row to the nearest of 127 steps of its largest number."""
    steps = operand.abs().amax(-1, keepdim=True) / 127
    return (operand / steps).round() * steps


def assert_near(found: Tensor, expected: Tensor) -> None:
    error = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=error, atol=error)


def in_chunks(found: World, seed: int, sizes: list[int]) -> list[Tensor]:
    """The outputs of all sequences, computed in random company."""
    dice = random.Random(seed)
    lengths = [len(operand) for operand in found.q]
    outputs: list[list[Tensor]] = [[] for _ in lengths]
    while left := [i for i, n in enumerate(lengths) if found.sequences[i].num_computed < n]:
        chosen = dice.sample(left, dice.randint(1, len(left)))
        rest = {i: lengths[i] - found.sequences[i].num_computed for i in chosen}
        for i, out in found.step({i: min(dice.choice(sizes), rest[i]) for i in chosen}).items():
            outputs[i].append(out)
    return [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize(("seed", "block_size"), [(0, 16), (1, 32), (2, 16)])
@pytest.mark.parametrize("name", SPECS)
def test_any_mix_of_chunks_equals_attention_written_out(
    kernels: NativeAttention, name: str, seed: int, block_size: int
) -> None:
    found = world(kernels, [1, 9, 50, 33, 16], name, seed=seed, block_size=block_size)
    for number, out in enumerate(in_chunks(found, seed, [1, 1, 2, 5, 17, 40])):
        assert_near(out, as_read_back(found).expected(number))


@pytest.mark.parametrize("name", ["grouped", "window"])
def test_contexts_of_several_segments_are_right(kernels: NativeAttention, name: str) -> None:
    lengths = [3000, 1025, 700, 1024]
    found = world(kernels, lengths, name, seed=0)
    found.step({i: n - 1 for i, n in enumerate(lengths)})
    last = found.step(dict.fromkeys(range(len(lengths)), 1))
    for number in range(len(lengths)):
        assert_near(last[number][0], attend_last(as_read_back(found), number))


@pytest.mark.parametrize("name", ["grouped", "window", "one-kv-head"])
def test_outputs_have_the_same_bits_in_any_company_cut_anyhow_and_with_any_number_of_threads(
    kernels: NativeAttention, name: str
) -> None:
    lengths = [1300, 70, 2100, 5]

    def outputs(seed: int, sizes: list[int]) -> list[Tensor]:
        return in_chunks(world(kernels, lengths, name, seed=7), seed, sizes)

    whole, before = outputs(0, [5000]), torch.get_num_threads()
    try:
        for num_threads, sizes in ((1, [500, 37, 1]), (2, [64]), (5, [1000, 3])):
            torch.set_num_threads(num_threads)
            for expected, got in zip(whole, outputs(num_threads, sizes), strict=True):
                assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("operands", ["q", "k", "v"])
@pytest.mark.parametrize("length", [1, 40, 1500])
def test_what_is_not_a_number_comes_out_as_such_and_of_its_own_sequence_alone(
    kernels: NativeAttention, operands: str, length: int
) -> None:
    found = world(kernels, [length, 30], "grouped", seed=5)
    getattr(found, operands)[0][-1] = float("nan")
    broken = found.step({0: length, 1: 30})
    sound = world(kernels, [length, 30], "grouped", seed=5).step({1: 30})[1]
    assert torch.equal(broken[1], sound)
    assert broken[0][-1].isnan().all()


def test_only_what_the_kernels_know_is_given_to_them() -> None:
    plain = LayerSpec(2, 64, 64, None, None)
    assert can_attend([plain, LayerSpec(2, 64, 64, 5, None)], 16)
    assert not can_attend([plain], 8)
    for other in (
        LayerSpec(2, 64, 64, None, 30.0),
        LayerSpec(2, 64, 64, None, None, has_sinks=True),
        LayerSpec(2, 40, 64, None, None),
        LayerSpec(2, 512, 64, None, None),
    ):
        assert not can_attend([plain, other], 16)
