"""BlockPool by itself: eviction order, sharing, and what a hit must compare."""

import pytest

from adapters.types import AdapterRef
from server.engine import blocks as blocks_module
from server.engine.blocks import BlockPool
from server.engine.sequence import BlockContent, BlockKey, Sequence, SequenceId
from server.types import SamplingParams, StopCriteria
from tests.fakes import adapter, used


def sequence(tokens: list[int], ref: AdapterRef | None = None) -> Sequence:
    return Sequence(
        id=SequenceId(0),
        tokens=list(tokens),
        num_prompt=len(tokens),
        sampling=SamplingParams(),
        stop=StopCriteria(max_tokens=1),
        seed=0,
        adapter=used(ref),
        arrival=0.0,
    )


def computed(pool: BlockPool, tokens: list[int], ref: AdapterRef | None = None) -> Sequence:
    """A sequence that holds blocks for its tokens and has computed and published them."""
    made = sequence(tokens, ref)
    pool.allocate(made, pool.match_prefix(made))
    before, made.num_computed = made.num_computed, made.num_tokens
    pool.publish(made, before)
    return made


def hits(pool: BlockPool, tokens: list[int], ref: AdapterRef | None = None) -> int:
    return len(pool.match_prefix(sequence(tokens, ref)))


def test_a_table_holds_just_enough_blocks() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    one = computed(pool, [7] * 9)
    assert len(one.block_table) == 3
    assert pool.num_free == 5
    pool.check([one.block_table])


def test_a_table_grows_block_by_block() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    one = sequence([1, 2])
    pool.allocate(one)
    pool.allocate(one)
    assert len(one.block_table) == 1
    one.tokens.append(3)
    assert pool.shortage(one) == 0
    pool.allocate(one)
    one.tokens += [4, 5]
    assert pool.shortage(one) == 1


def test_published_blocks_are_found_by_who_begins_alike() -> None:
    pool = BlockPool(num_blocks=8, block_size=2)
    one = computed(pool, [1, 2, 3, 4, 5])
    assert pool.match_prefix(sequence([1, 2, 3, 4, 9])) == one.block_table[:2]
    assert hits(pool, [1, 2, 9, 4, 5]) == 1
    assert hits(pool, [9, 2, 3, 4, 5]) == 0


def test_the_last_token_is_never_matched() -> None:
    pool = BlockPool(num_blocks=8, block_size=2)
    computed(pool, [1, 2, 3, 4])
    assert hits(pool, [1, 2, 3, 4]) == 1
    assert hits(pool, [1, 2, 3, 4, 5]) == 2
    assert hits(pool, [1]) == 0


def test_a_block_is_found_only_behind_the_same_beginning() -> None:
    pool = BlockPool(num_blocks=8, block_size=2)
    computed(pool, [1, 2, 3, 4])
    computed(pool, [5, 6, 7, 8])
    assert hits(pool, [1, 2, 7, 8, 0]) == 1


def test_adapters_do_not_share_blocks_but_names_of_one_revision_do() -> None:
    pool = BlockPool(num_blocks=8, block_size=2)
    computed(pool, [1, 2, 3], adapter("ant"))
    assert hits(pool, [1, 2, 3]) == 0
    assert hits(pool, [1, 2, 3], adapter("bee")) == 0
    assert hits(pool, [1, 2, 3], adapter("ant", "changed")) == 0
    assert hits(pool, [1, 2, 3], adapter("alias", "r-ant")) == 1


def test_equal_keys_with_other_tokens_are_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "_digest", lambda parent, tokens: BlockKey(b"the same for all"))
    pool = BlockPool(num_blocks=8, block_size=2)
    computed(pool, [1, 2, 3])
    assert hits(pool, [1, 2, 3]) == 1
    assert hits(pool, [8, 9, 3]) == 0


def test_equal_keys_and_tokens_behind_another_beginning_are_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "_digest", lambda parent, tokens: BlockKey(bytes(tokens)))
    pool = BlockPool(num_blocks=8, block_size=2)
    computed(pool, [1, 2, 5, 5])
    computed(pool, [3, 4, 0])
    assert hits(pool, [1, 2, 5, 5, 0]) == 2
    assert hits(pool, [3, 4, 5, 5, 0]) == 1


def test_nothing_is_found_before_it_is_published() -> None:
    pool = BlockPool(num_blocks=8, block_size=2)
    one = sequence([1, 2, 3, 4])
    pool.allocate(one)
    assert hits(pool, [1, 2, 3, 4]) == 0
    one.num_computed = 3
    pool.publish(one, 0)
    assert hits(pool, [1, 2, 3, 4, 5]) == 1


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    one = computed(pool, [1, 2, 3])
    two = computed(pool, [1, 2, 4])
    assert one.block_table[0] == two.block_table[0]
    assert pool.num_free == 1
    pool.check([one.block_table, two.block_table])
    pool.free(one)
    assert pool.num_free == 2
    pool.free(two)
    assert pool.num_free == 4
    assert (two.block_table, two.num_computed) == ([], 0)
    pool.check([])


def test_duplicates_are_kept_apart_and_the_first_stays_published() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    one, two = sequence([1, 2, 3]), sequence([1, 2, 3])
    for twin in (one, two):
        pool.allocate(twin)
    for twin in (one, two):
        twin.num_computed = 2
        pool.publish(twin, 0)
    assert set(one.block_table).isdisjoint(two.block_table)
    assert pool.match_prefix(sequence([1, 2, 3])) == one.block_table[:1]
    pool.check([one.block_table, two.block_table])


def test_blocks_with_nothing_to_lose_are_taken_first() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    one = computed(pool, [1, 2, 3, 4, 5])  # two published blocks, one half full
    half_full = one.block_table[-1]
    pool.free(one)
    two = sequence([8, 9])
    pool.allocate(two)
    assert two.block_table == [half_full]
    assert hits(pool, [1, 2, 3, 4, 5]) == 2


def test_a_prompts_head_is_evicted_after_its_tail() -> None:
    pool = BlockPool(num_blocks=3, block_size=2)
    pool.free(computed(pool, [1, 2, 3, 4, 5, 6]))
    found = []
    for newcomer in (computed(pool, [20]), computed(pool, [30]), computed(pool, [40])):
        found.append(newcomer.block_table)
    assert found == [[2], [1], [0]]


def test_the_least_recently_used_text_is_evicted_first() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    old, new = computed(pool, [1, 2]), computed(pool, [3, 4])
    pool.free(old)
    pool.free(new)
    pool.free(computed(pool, [1, 2, 0]))  # uses the old text again; takes the block of the new one
    assert hits(pool, [1, 2, 0]) == 1
    assert hits(pool, [3, 4, 0]) == 0


def test_waking_a_free_published_block_counts_as_taking_it() -> None:
    pool = BlockPool(num_blocks=3, block_size=2)
    pool.free(computed(pool, [1, 2, 3, 4]))
    one = sequence([1, 2, 3, 4, 5, 6, 7])  # two known blocks, two new ones
    matched = pool.match_prefix(one)
    assert len(matched) == 2
    assert pool.shortage(one, matched) == 1
    assert pool.shortage(one, matched, spare=2) == 3


def test_retracted_blocks_are_offered_to_nobody() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    one = computed(pool, [1, 2, 3, 4, 5])
    pool.retract(one)
    assert hits(pool, [1, 2, 3, 4, 5]) == 0
    pool.check([one.block_table])


def test_without_prefix_caching_nothing_is_ever_found() -> None:
    pool = BlockPool(num_blocks=4, block_size=2, enable_prefix_caching=False)
    one = computed(pool, [1, 2, 3])
    assert hits(pool, [1, 2, 3]) == 0
    assert one.block_contents == []


def test_keys_are_made_once_and_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[tuple[int, ...]] = []
    real = blocks_module._digest

    def counting(parent: BlockKey, tokens: tuple[int, ...]) -> BlockKey:
        digested.append(tokens)
        return real(parent, tokens)

    monkeypatch.setattr(blocks_module, "_digest", counting)
    pool = BlockPool(num_blocks=8, block_size=2)
    one = sequence([1, 2, 3, 4, 5, 6])
    for _ in range(3):
        assert pool.match_prefix(one) == []
    assert digested == [(1, 2)]
    pool.allocate(one)
    one.num_computed = 6
    pool.publish(one, 0)
    assert digested == [(1, 2), (3, 4), (5, 6)]


def test_sequence_that_waits_is_matched_again_without_comparing_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long one at the head of the queue is matched at every step."""
    num_compared = 0

    def counting(one: BlockContent, other: object) -> bool:
        nonlocal num_compared
        num_compared += 1
        return isinstance(other, BlockContent) and (one.parent, one.tokens) == (other.parent, other.tokens)

    monkeypatch.setattr(BlockContent, "__eq__", counting)
    pool = BlockPool(num_blocks=8, block_size=2)
    first = computed(pool, [1, 2, 3, 4, 5, 6, 7])
    waiting = sequence([1, 2, 3, 4, 5, 6, 8])
    for _ in range(5):
        assert pool.match_prefix(waiting) == first.block_table[:3]
    assert num_compared == 3


def test_match_follows_a_pool_that_forgets_and_learns_again() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    first = computed(pool, [1, 2, 3, 4, 5])
    waiting = sequence([1, 2, 3, 4, 6])
    assert len(pool.match_prefix(waiting)) == 2
    pool.free(first)
    pool.free(computed(pool, [9] * 8))
    assert pool.match_prefix(waiting) == []
    again = computed(pool, [1, 2, 3, 4, 5])
    assert pool.match_prefix(waiting) == again.block_table[:2]


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    one = computed(pool, [1, 2, 3])
    with pytest.raises(AssertionError, match="holders"):
        pool.check([])
    one.block_table.append(one.block_table[0])
    with pytest.raises(AssertionError, match="twice"):
        pool.check([one.block_table])
