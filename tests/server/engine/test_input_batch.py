"""The batch of a plan, checked against the plan position by position."""

import random

import pytest
import torch

from adapters.types import AdapterRef, AdapterUse, Revision
from server.engine.input_batch import InputBatch, build_input_batch
from server.engine.plan import ScheduledChunk, StepPlan
from server.engine.sequence import Sequence, SequenceId
from server.model.torch_attention import TorchAttention
from server.model.torch_step import DecodeGroup
from server.types import SamplingParams, StopCriteria

BLOCK = 4


def sequence(number: int, num_tokens: int, *, adapter: AdapterRef | None = None, seed: int = 0) -> Sequence:
    """Tokens are 1000 * number + position; blocks are far apart and in no order."""
    blocks = [number * 100 + i for i in range(-(-num_tokens // BLOCK))]
    random.Random(seed).shuffle(blocks)
    return Sequence(
        id=SequenceId(number),
        tokens=[1000 * number + position for position in range(num_tokens)],
        num_prompt=num_tokens,
        sampling=SamplingParams(),
        stop=StopCriteria(max_tokens=1),
        seed=0,
        adapter=None if adapter is None else AdapterUse.of(adapter),
        arrival=0.0,
        block_table=blocks,
    )


def build(*chunks: ScheduledChunk, windows: tuple[int | None, ...] = (None,)) -> InputBatch:
    return build_input_batch(
        StepPlan(chunks),
        TorchAttention(),
        windows=windows,
        block_size=BLOCK,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def place(item: Sequence, position: int) -> int:
    return item.block_table[position // BLOCK] * BLOCK + position % BLOCK


def keys_read(group: DecodeGroup) -> list[set[int]]:
    """By row, the KV positions whose keys it sees."""
    rows = group.stop - group.start
    tables = group.blocks.view(rows, -1, 1) * BLOCK + torch.arange(BLOCK)
    gathered = tables.view(rows, -1)[:, group.key_start : group.key_stop]
    if group.mask is None:
        return [set(row.tolist()) for row in gathered]
    return [set(row[mask.view(-1) == 0].tolist()) for row, mask in zip(gathered, group.mask, strict=True)]


def test_tokens_positions_and_places_follow_the_plan() -> None:
    long, short, mid = sequence(1, 11), sequence(2, 6), sequence(3, 9)
    batch = build(ScheduledChunk(short, 5, 1), ScheduledChunk(long, 3, 5), ScheduledChunk(mid, 8, 1))
    assert batch.input_ids.tolist() == [3008, 2005, 1003, 1004, 1005, 1006, 1007]
    assert batch.positions.tolist() == [8, 5, 3, 4, 5, 6, 7]
    expected = [place(mid, 8), place(short, 5), *(place(long, p) for p in range(3, 8))]
    assert batch.attention.kv_index.tolist() == expected


def test_only_chunks_that_reach_the_end_sample() -> None:
    whole, part, one = sequence(1, 6), sequence(2, 9), sequence(3, 4)
    batch = build(ScheduledChunk(part, 2, 3), ScheduledChunk(whole, 0, 6), ScheduledChunk(one, 3, 1))
    assert [item.id for item in batch.sampling] == [3, 1]
    assert batch.last.index.tolist() == list(batch.last.host) == [0, 1 + 3 + 6 - 1]


def test_adapters_are_told_in_batch_order() -> None:
    ref = AdapterRef("a", Revision("r"))
    batch = build(ScheduledChunk(sequence(1, 9, adapter=ref), 0, 5), ScheduledChunk(sequence(2, 4), 3, 1))
    assert batch.adapter_rows == ((None, 1), (AdapterUse.of(ref), 5))


def test_rows_before_an_adapter_begins_are_the_base_model_s() -> None:
    use = AdapterUse.of(AdapterRef("a", Revision("r")))
    item, decoding = sequence(1, 9, adapter=use.refs[0]), sequence(2, 6, adapter=use.refs[0])
    item.adapter_start = decoding.adapter_start = 4

    def rows(*chunks: ScheduledChunk) -> tuple[tuple[AdapterUse | None, int], ...]:
        return build(*chunks).adapter_rows

    assert rows(ScheduledChunk(item, 1, 8)) == ((None, 3), (use, 5))
    assert rows(ScheduledChunk(item, 1, 3)) == ((None, 3),)
    assert rows(ScheduledChunk(item, 4, 5)) == ((use, 5),)
    assert rows(ScheduledChunk(item, 3, 1)) == ((None, 1),)
    assert rows(ScheduledChunk(decoding, 5, 1), ScheduledChunk(item, 3, 6)) == ((use, 1), (None, 1), (use, 5))


def test_rest_of_a_block_is_cleared_when_it_is_entered_and_never_again() -> None:
    item = sequence(1, 20)
    assert build(ScheduledChunk(item, 0, 4)).stale is None  # fills its block
    entered = build(ScheduledChunk(item, 2, 7)).stale  # positions 2..8
    assert entered is not None
    assert entered.tolist() == [place(item, p) for p in (9, 10, 11)]
    assert build(ScheduledChunk(item, 9, 1)).stale is None
    assert build(ScheduledChunk(item, 9, 2)).stale is None


@pytest.mark.parametrize("window", [None, 3, 5, 100])
@pytest.mark.parametrize("seed", range(5))
def test_decode_rows_see_exactly_their_own_keys(window: int | None, seed: int) -> None:
    lengths = random.Random(seed).choices([1, 2, 7, 8, 30, 31, 400, 1500], k=7)
    items = {number: sequence(number, length, seed=seed) for number, length in enumerate(lengths)}
    batch = build(*(ScheduledChunk(i, i.num_tokens - 1, 1) for i in items.values()), windows=(None, window))
    view = batch.attention.views[window]
    seen = [keys for group in view.groups for keys in keys_read(group)]
    assert [(group.start, group.stop) for group in view.groups][-1][1] == len(items)
    for row, keys in enumerate(seen):
        item = items[int(batch.input_ids[row] - batch.positions[row]) // 1000]
        last = item.num_tokens - 1
        oldest = 0 if window is None else max(0, last - window + 1)
        assert keys == {place(item, p) for p in range(oldest, last + 1)}


def test_rows_of_very_different_lengths_do_not_pad_each_other() -> None:
    chunks = [
        ScheduledChunk(i, i.num_tokens - 1, 1) for i in (sequence(1, 4000), sequence(2, 30), sequence(3, 20))
    ]
    groups = build(*chunks).attention.views[None].groups
    assert [(group.start, group.stop) for group in groups] == [(0, 1), (1, 3)]
    assert groups[0].mask is None


def test_chunk_that_begins_its_sequence_reads_nothing_back() -> None:
    (chunk,) = build(ScheduledChunk(sequence(1, 9), 0, 7)).attention.views[None].chunks
    assert chunk.blocks is None
    assert chunk.mask is None


@pytest.mark.parametrize("window", [None, 3, 6, 50])
@pytest.mark.parametrize(("start", "num_tokens"), [(0, 9), (3, 2), (4, 4), (11, 9), (17, 13)])
def test_chunk_rows_see_the_keys_up_to_themselves(start: int, num_tokens: int, window: int | None) -> None:
    item = sequence(1, 30, seed=start)
    batch = build(ScheduledChunk(item, start, num_tokens), windows=(window,))
    (chunk,) = batch.attention.views[window].chunks
    if chunk.blocks is None:
        gathered = [place(item, p) for p in range(num_tokens)]
    else:
        gathered = (chunk.blocks[:, None] * BLOCK + torch.arange(BLOCK)).view(-1).tolist()
        gathered = gathered[chunk.key_start : chunk.key_stop]
    for row in range(num_tokens):
        if chunk.mask is None:
            seen = set(gathered[: row + 1])
        else:
            seen = {
                key for key, hidden in zip(gathered, chunk.mask[row].tolist(), strict=True) if hidden == 0
            }
        oldest = 0 if window is None else max(0, start + row - window + 1)
        assert seen == {place(item, p) for p in range(oldest, start + row + 1)}


def test_layers_share_a_view_while_nobody_is_longer_than_the_window() -> None:
    views = build(ScheduledChunk(sequence(1, 9), 8, 1), windows=(None, 9, 4)).attention.views
    assert views[9] is views[None]
    assert views[4] is not views[None]
