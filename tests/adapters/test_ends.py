"""What adapters change of the embedding and of the head, against the loops of reference.py."""

import random
from collections.abc import Sequence

import pytest
import torch

from adapters.batch import LoraBatch
from adapters.device import Arena, DeviceArena, HostArena
from adapters.kernels import reference
from adapters.layers import LoraContext, LoraEmbedding, LoraHead
from adapters.run import RunPlacer, make_token_rows
from adapters.types import (
    AdapterRef,
    AdapterUse,
    AdapterWrite,
    LinearTarget,
    LoraEntry,
    Revision,
    TargetId,
    TargetKind,
    TokenRowsEntry,
)
from adapters.weights import LoraWeights
from tests.adapters.making import put, use_of

VOCAB, WIDTH, RANK = 23, 10, 3
CPU = torch.device("cpu")
EMBEDDING = LinearTarget("embed_tokens", VOCAB, WIDTH, TargetKind.EMBEDDING)
HEAD = LinearTarget("lm_head", WIDTH, VOCAB, TargetKind.HEAD)
KINDS = ("embedding", "head", "rows", "tied", "gained", "linear")


def made_ends(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoraWeights:
    """An adapter of the two ends, all numbers random."""
    generator = torch.Generator().manual_seed(seed)
    placer = RunPlacer(dtype)
    entries: dict[TargetId, LoraEntry] = {}
    token_rows: list[TokenRowsEntry] = []

    def add_entry(target: int, linear: LinearTarget, *, has_gain: bool = False) -> None:
        num_in, num_out = linear.in_features, linear.out_features
        places = placer.place(RANK * num_in), placer.place(num_out * RANK)
        entries[TargetId(target)] = LoraEntry(
            RANK,
            num_in,
            num_out,
            *places,
            offset_gain=placer.place(num_out) if has_gain else None,
            offset_bias=placer.place(num_out) if has_gain else None,
            kind=linear.kind,
        )

    def add_rows(kind: TargetKind, num_rows: int) -> None:
        places = placer.place_ids(num_rows), placer.place(num_rows * WIDTH)
        token_rows.append(TokenRowsEntry(num_rows, WIDTH, *places, kind))

    if kind == "linear":
        add_entry(0, LinearTarget("q_proj", WIDTH, WIDTH))
    if kind in ("embedding", "gained"):
        add_entry(1, EMBEDDING, has_gain=kind == "gained")
    if kind in ("head", "gained", "tied"):
        add_entry(2, HEAD, has_gain=kind == "gained")
    if kind in ("rows", "tied"):
        add_rows(TargetKind.EMBEDDING, 4)
        add_rows(TargetKind.HEAD, 5)
    run = (torch.randn(placer.num_bytes // dtype.itemsize, generator=generator) * 0.3).to(dtype)
    for entry in token_rows:
        chosen = torch.randperm(VOCAB, generator=generator)[: entry.num_rows]
        make_token_rows(run, entry).ids.copy_(chosen.sort().values)
    return LoraWeights(
        Revision(f"{kind}{seed}"), run, entries, RANK, (), placer.num_bytes, token_rows=tuple(token_rows)
    )


def adapters(dtype: torch.dtype = torch.float32) -> list[LoraWeights]:
    return [made_ends(kind, dtype=dtype, seed=seed) for seed, kind in enumerate(KINDS)]


def arena_of(kind: str, held: Sequence[LoraWeights]) -> Arena:
    arena: Arena = HostArena() if kind == "host" else DeviceArena(CPU, 1 << 16, held[0].run.dtype)
    offset = 64
    for weights in held:
        put(arena, weights, offset)
        offset += weights.num_bytes
    if kind == "moved":  # all of them to the left, by less than the size of any
        offset = 64
        for weights in held:
            ref = AdapterRef("any", weights.revision)
            arena.write(AdapterWrite(ref, offset - 64, weights.num_bytes, moved_from=offset), None)
            offset += weights.num_bytes
    return arena


def random_step(chance: random.Random, held: Sequence[LoraWeights]) -> list[tuple[AdapterUse | None, int]]:
    """Runs of tokens of single adapters, some scaled, and of sets."""
    names = [weights.revision for weights in held]
    step: list[tuple[AdapterUse | None, int]] = []
    for _ in range(chance.randrange(1, 10)):
        scales = [chance.choice([0.5, 1.0, -2.0]) for _ in names]
        several = use_of(*chance.sample([names[0], names[1], names[5]], 2), scales=scales[:2])
        single = use_of(chance.choice(names), scales=[chance.choice([1.0, 1.0, 0.5])])
        step.append((chance.choice([None, single, single, several]), chance.choice([1, 1, 2, 7])))
    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("arena", ["host", "device", "moved"])
@pytest.mark.parametrize("seed", range(6))
def test_random_mixes_are_what_the_reference_says(arena: str, dtype: torch.dtype, seed: int) -> None:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    held = adapters(dtype)
    ours = arena_of(arena, held)
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    num_changed = 0
    for _ in range(6):
        step = random_step(chance, held)
        num_tokens = sum(count for _, count in step)
        batch = LoraBatch.build(ours, step)
        ids = torch.randint(0, VOCAB, (num_tokens,), generator=generator)
        y = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype)
        logits = torch.randn(num_tokens, VOCAB, generator=generator).to(dtype)
        if batch is None:
            continue
        got, expected = y.clone(), reference.change_embeddings(y.clone(), ids, batch)
        batch.change_embeddings(got, ids)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        num_changed += int((got != y).any())
        got, expected = logits.clone(), reference.change_logits(logits.clone(), y, batch)
        batch.change_logits(got, y)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        num_changed += int((got != logits).any())
    assert num_changed > 0


@pytest.mark.parametrize("seed", range(5))
def test_the_head_gets_a_batch_of_the_rows_that_it_sees(seed: int) -> None:
    """In any order, and only some."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    held = adapters()
    arena = arena_of("host", held)
    step = [*random_step(chance, held), (use_of(held[1].revision), 3)]
    num_tokens = sum(count for _, count in step)
    batch = LoraBatch.build(arena, step)
    assert batch is not None
    x, logits = torch.randn(num_tokens, WIDTH), torch.randn(num_tokens, VOCAB, generator=generator)
    everywhere = logits.clone()
    batch.change_logits(everywhere, x)
    rows = chance.sample(range(num_tokens), chance.randrange(1, num_tokens + 1))

    whole, some = batch.for_head(None), batch.for_head(rows)

    assert whole is not None
    assert all(arena.adapter(group.revision).changes_head for group in whole.groups)
    got = logits.clone()
    whole.change_logits(got, x)
    torch.testing.assert_close(got, everywhere)
    got = logits[rows].clone()
    if some is not None:
        assert some.num_tokens == len(rows)
        some.change_logits(got, x[rows])
    torch.testing.assert_close(got, everywhere[rows])


def test_a_step_whose_adapters_leave_the_head_alone_has_no_batch_for_it() -> None:
    held = adapters()
    arena = arena_of("host", held)
    linear, embedding, head = (
        use_of(f"{kind}{KINDS.index(kind)}") for kind in ("linear", "embedding", "head")
    )

    batch = LoraBatch.build(arena, [(linear, 2), (embedding, 3)])
    assert batch is not None
    assert batch.for_head(None) is None
    assert batch.for_head([0, 4]) is None
    batch = LoraBatch.build(arena, [(head, 1), (None, 1), (linear, 1)])
    assert batch is not None
    assert batch.for_head([1, 2]) is None, "those that change it are not wanted"
    only = batch.for_head([2, 0])
    assert only is not None
    assert [group.spans for group in only.groups] == [((1, 2),)]


def test_trained_rows_replace_those_of_their_tokens_only() -> None:
    weights = made_ends("rows")
    arena = arena_of("host", [weights])
    trained = arena.adapter(weights.revision).embedding_rows
    assert trained is not None
    batch = LoraBatch.build(arena, [(use_of(weights.revision), VOCAB)])
    assert batch is not None
    table = torch.randn(VOCAB, WIDTH)
    y = table.clone()

    batch.change_embeddings(y, torch.arange(VOCAB))

    assert torch.equal(y[trained.ids], trained.rows)
    others = [token for token in range(VOCAB) if token not in trained.ids.tolist()]
    assert torch.equal(y[others], table[others])


def test_wrapped_ends_ask_one_question_and_see_the_right_rows() -> None:
    held = adapters()
    arena = arena_of("host", held)
    context = LoraContext()
    embed, linear = torch.nn.Embedding(VOCAB, WIDTH), torch.nn.Linear(WIDTH, VOCAB)
    embedding, head = LoraEmbedding(embed, EMBEDDING, context), LoraHead(linear, HEAD, context)
    ids, x = torch.randint(0, VOCAB, (1, 5)), torch.randn(1, 2, WIDTH)
    with torch.inference_mode():
        assert torch.equal(embedding(ids), embed(ids))
        assert torch.equal(head(x), linear(x))
        assert embedding.weight is embed.weight
        use = use_of(held[4].revision)
        context.batch = LoraBatch.build(arena, [(None, 1), (use, 4)])
        assert context.batch is not None
        changed = embedding(ids)
        assert changed.shape == (1, 5, WIDTH)
        assert torch.equal(changed[0, 0], embed(ids)[0, 0])
        assert not torch.isclose(changed[0, 1:], embed(ids)[0, 1:]).all(-1).any()
        assert torch.equal(head(x), linear(x)), "the head is not told by the step"
        context.head = context.batch.for_head([0, 3])
        changed = head(x)
        assert torch.equal(changed[0, 0], linear(x)[0, 0])
        assert not torch.allclose(changed[0, 1], linear(x)[0, 1])
        with pytest.raises(AssertionError):
            embedding(ids[:, :3])
        with pytest.raises(AssertionError):
            head(torch.randn(1, 3, WIDTH))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_random_mixes_are_what_the_reference_says_on_the_gpu(seed: int) -> None:
    chance, device = random.Random(seed), torch.device("cuda")
    held = adapters()
    theirs, ours = arena_of("host", held), DeviceArena(device, 1 << 16, torch.float32)
    offset = 0
    for weights in held:
        put(ours, weights, offset)
        offset += weights.num_bytes
    step = [*random_step(chance, held), (use_of(held[3].revision), 2)]
    num_tokens = sum(count for _, count in step)
    batch, oracle = LoraBatch.build(ours, step), LoraBatch.build(theirs, step)
    assert batch is not None
    assert oracle is not None
    ids = torch.randint(0, VOCAB, (num_tokens,))
    y, logits = torch.randn(num_tokens, WIDTH), torch.randn(num_tokens, VOCAB)
    got = y.to(device)
    batch.change_embeddings(got, ids.to(device))
    torch.testing.assert_close(
        got.cpu(), reference.change_embeddings(y.clone(), ids, oracle), rtol=1e-4, atol=1e-4
    )
    got = logits.to(device)
    batch.change_logits(got, y.to(device))
    torch.testing.assert_close(
        got.cpu(), reference.change_logits(logits.clone(), y, oracle), rtol=1e-4, atol=1e-4
    )
