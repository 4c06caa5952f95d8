"""Paged attention against attention written out, one token and one head at a time."""

import math
import random

import pytest
import torch
from torch import Tensor, nn

from server.engine.input_batch import build_input_batch
from server.engine.plan import ScheduledChunk, StepPlan
from server.engine.sequence import Sequence, SequenceId
from server.model import torch_attention, torch_step
from server.model.attention import LAYER_ATTRIBUTE, AttentionKernels, LayerSpec, StepContext, paged_attention
from server.model.torch_attention import TorchAttention
from server.model.torch_step import PrefillChunk, mask_shape
from server.types import SamplingParams, StopCriteria
from tests.server.model_rig import fill_with_nan

BLOCK = 4
HEADS = 6


def written_out(q: Tensor, k: Tensor, v: Tensor, spec: LayerSpec, sinks: Tensor | None) -> Tensor:
    """q [L, Hq, D], k [L, Hk, D], v [L, Hk, Dv] of one whole sequence -> [L, Hq, Dv]."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2])
    for position in range(q.shape[0]):
        oldest = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            scores = k[oldest : position + 1, shared] @ q[position, head] / math.sqrt(q.shape[2])
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            weights = scores.exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].exp())
            out[position, head] = (weights[:, None] * v[oldest : position + 1, shared]).sum(0) / total
    return out


class World:
    """Sequences with random operands for one layer, and a cache full of NaN."""

    def __init__(
        self,
        lengths: list[int],
        spec: LayerSpec,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        kernels: AttentionKernels | None = None,
        block_size: int = BLOCK,
        num_heads: int = HEADS,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.spec = spec
        self.dtype = dtype
        self.num_heads = num_heads
        self.kernels = TorchAttention() if kernels is None else kernels
        self.sinks = normal(num_heads) if spec.has_sinks else None
        self.q = [normal(n, num_heads, spec.key_dim) * 2 for n in lengths]
        self.k = [normal(n, spec.num_kv_heads, spec.key_dim) for n in lengths]
        self.v = [normal(n, spec.num_kv_heads, spec.value_dim) for n in lengths]
        blocks = list(range(sum(-(-n // block_size) for n in lengths)))
        random.Random(seed).shuffle(blocks)
        self.context = StepContext()
        shapes = self.kernels.shapes(spec, len(blocks), block_size)
        keys, values = (torch.empty(shape, dtype=self.kernels.cache_dtype(dtype)) for shape in shapes)
        fill_with_nan(keys)
        fill_with_nan(values)
        self.context.keys, self.context.values = [keys], [values]
        self.context.block_size = block_size
        self.module = nn.Module()
        setattr(self.module, LAYER_ATTRIBUTE, self.kernels.layer(0, spec, self.context))
        self.sequences = [
            Sequence(
                SequenceId(i), list(range(n)), n, SamplingParams(), StopCriteria(1), 0, None, 0.0,
                block_table=[blocks.pop() for _ in range(-(-n // block_size))],
            )
            for i, n in enumerate(lengths)
        ]  # fmt: skip

    def step(self, shares: dict[int, int]) -> dict[int, Tensor]:
        """Compute so many more positions of each sequence; their outputs [n, Hq, Dv]."""
        chunks = [
            ScheduledChunk(self.sequences[i], self.sequences[i].num_computed, n) for i, n in shares.items()
        ]
        batch = build_input_batch(
            StepPlan(tuple(chunks)),
            self.kernels,
            windows={self.spec.sliding_window},
            block_size=self.context.block_size,
            dtype=self.dtype,
            device=torch.device("cpu"),
        )
        ordered = sorted((c for c in chunks if c.num_tokens == 1), key=lambda c: -c.start)
        ordered += [c for c in chunks if c.num_tokens > 1]
        if batch.stale is not None:
            self.kernels.clear(self.context.keys[0], batch.stale)
            self.kernels.clear(self.context.values[0], batch.stale)
        self.context.batch = batch.attention
        q, k, v = (self.flat(operands, ordered) for operands in (self.q, self.k, self.v))
        out, _ = paged_attention(self.module, q, k, v, None, s_aux=self.sinks, dropout=0.0)
        assert out.shape == (1, sum(shares.values()), self.num_heads, self.spec.value_dim)
        found: dict[int, Tensor] = {}
        at = 0
        for chunk in ordered:
            found[chunk.sequence.id] = out[0, at : at + chunk.num_tokens]
            at += chunk.num_tokens
            chunk.sequence.num_computed += chunk.num_tokens
        return found

    def flat(self, operands: list[Tensor], ordered: list[ScheduledChunk]) -> Tensor:
        """[1, H, T, D], as transformers hands them over."""
        parts = [operands[c.sequence.id][c.start : c.start + c.num_tokens] for c in ordered]
        return torch.cat(parts).to(self.dtype).transpose(0, 1)[None]

    def expected(self, number: int) -> Tensor:
        return written_out(self.q[number], self.k[number], self.v[number], self.spec, self.sinks)


SPECS = {
    "grouped": LayerSpec(2, 8, 8, None, None),
    "one-kv-head": LayerSpec(1, 8, 8, None, None),
    "window": LayerSpec(2, 8, 8, 5, None),
    "cap": LayerSpec(2, 8, 8, None, 3.0),
    "cap-window": LayerSpec(3, 8, 8, 6, 3.0),
    "sinks": LayerSpec(2, 8, 8, None, None, has_sinks=True),
    "sinks-window": LayerSpec(6, 8, 8, 5, None, has_sinks=True),
    "latent": LayerSpec(6, 12, 8, None, None),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SPECS)
def test_any_mix_of_chunks_equals_attention_written_out(name: str, seed: int) -> None:
    lengths = [1, 9, 23, 14]
    world = World(lengths, SPECS[name], seed=seed)
    dice = random.Random(seed)
    outputs: dict[int, list[Tensor]] = {i: [] for i in range(len(lengths))}
    while left := [i for i, n in enumerate(lengths) if world.sequences[i].num_computed < n]:
        chosen = dice.sample(left, dice.randint(1, len(left)))
        rest = {i: lengths[i] - world.sequences[i].num_computed for i in chosen}
        for i, out in world.step({i: min(dice.choice([1, 1, 2, 5, 30]), rest[i]) for i in chosen}).items():
            outputs[i].append(out)
    for i, parts in outputs.items():
        torch.testing.assert_close(torch.cat(parts), world.expected(i), rtol=1e-4, atol=1e-5)


def test_many_rows_far_apart_in_length_are_right_in_every_group() -> None:
    lengths = [3000, 40, 41, 700, 5]
    world = World(lengths, SPECS["grouped"], seed=0)
    world.step({i: n - 1 for i, n in enumerate(lengths) if n > 1})
    assert len(set(world.sequences[0].block_table)) == 750
    found = world.step(dict.fromkeys(range(len(lengths)), 1))
    for i in (1, 2, 4):
        torch.testing.assert_close(found[i][0], world.expected(i)[-1], rtol=1e-4, atol=1e-5)
    last = {i: attend_last(world, i) for i in (0, 3)}
    for i, expected in last.items():
        torch.testing.assert_close(found[i][0], expected, rtol=1e-4, atol=1e-5)


def attend_last(world: World, number: int) -> Tensor:
    """The last position alone: written out in full it would take minutes."""
    window = world.spec.sliding_window
    oldest = 0 if window is None else -window
    q, k, v = world.q[number][-1], world.k[number][oldest:], world.v[number][oldest:]
    shared = torch.arange(world.num_heads) * k.shape[1] // world.num_heads
    weights = torch.einsum("hd,lhd->hl", q, k[:, shared]).div(math.sqrt(q.shape[1])).softmax(-1)
    return torch.einsum("hl,lhd->hd", weights, v[:, shared])


@pytest.mark.parametrize("name", SPECS)
def test_scores_written_out_in_tiles_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "_SCORE_TILE_BYTES", 4 * HEADS * 23 * 3)
    world = World([23], SPECS[name], seed=1)
    first, second = world.step({0: 4})[0], world.step({0: 19})[0]
    torch.testing.assert_close(torch.cat([first, second]), world.expected(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_chunk_tokens", [30, 67, 96])
@pytest.mark.parametrize("name", SPECS)
def test_chunks_in_tiles_give_what_whole_chunks_give(
    name: str, num_chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 16 queries, the smallest there are; the first one of a chunk is not full."""

    def outputs() -> list[Tensor]:
        world = World([100, 100], SPECS[name], seed=3)
        world.step({0: 100 - num_chunk_tokens})
        steps = [
            world.step({0: num_chunk_tokens, 1: num_chunk_tokens}),
            world.step({1: 100 - num_chunk_tokens}),
        ]
        assert len(torch.cat([steps[0][1], steps[1][1]])) == 100
        torch.testing.assert_close(torch.cat([steps[0][1], steps[1][1]]), expected, rtol=1e-4, atol=1e-5)
        return [steps[0][0], steps[0][1], steps[1][1]]

    expected = World([100, 100], SPECS[name], seed=3).expected(1)
    whole = outputs()
    monkeypatch.setattr(torch_step, "_MASK_BYTES", 1)
    torch.testing.assert_close(outputs(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_no_mask_of_a_long_chunk_is_larger_than_its_bound(item_bytes: int, window: int | None) -> None:
    for num_queries, num_keys in [(8192, 131072), (8192, 8192), (2, 1 << 20), (500, 700)]:
        height, width = mask_shape(num_queries, num_keys, window, item_bytes)
        assert height * width * item_bytes <= 64 << 20
        assert height == num_queries or height % 16 == 0
        chunk = PrefillChunk(0, num_queries, None, 0, num_keys, window, None)
        tiles = list(chunk.tiles(height))
        assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
        assert tiles[-1].stop == num_queries
        assert max(tile.key_stop - tile.key_start for tile in tiles) == width


@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_is_near(name: str) -> None:
    world = World([17, 6], SPECS[name], seed=2, dtype=torch.bfloat16)
    world.step({0: 9, 1: 5})
    world.step({0: 7})
    found = world.step({0: 1, 1: 1})
    for i in (0, 1):
        torch.testing.assert_close(found[i][0].float(), world.expected(i)[-1], rtol=0.1, atol=0.1)


def test_call_outside_of_a_step_is_our_own_mistake() -> None:
    world = World([4], SPECS["grouped"], seed=0)
    ones = torch.ones(1, HEADS, 1, 8)
    with pytest.raises(RuntimeError, match="outside a step"):
        paged_attention(world.module, ones, ones[:, :2], ones[:, :2], None)
