"""KV memory as bookkeeping: who holds which block, and which blocks can be shared.

A block is a run of `block_size` KV positions. The pool sees numbers, never tensors.

    free order   [ nothing to lose ............ | published, least recently freed .... most recently freed ]
                   taken first                                                             taken last

A block is either *held* (by one or more sequences) or *free* (in the free order). Apart from that, a full
block may be *published*: its key is in the prefix index, and a sequence that begins with the same tokens may
share it. A published block that becomes free keeps its content until it is taken for something else.

The key of a block is blake2b(key of the block before, its tokens). K and V depend on the adapter, so what it
is salts the keys: that of the first block in which it is active, and through it all that follow. That is the
first block, but for adapters that begin to be active inside a prompt. The blocks before that hold what the
base model computes, and are shared with it:

    adapter_start        v
    blocks    [ base ][ base ][ salted with adapter and start ][ ... ]
                         ^ the start is inside: another start, other K and V

An entry remembers what its key was made from and a hit compares it: equal keys with other contents, however
unlikely, must not serve foreign text.

Two sequences that compute the same tokens side by side keep a block each and only the first is published.
Merging them would change a block table that the device may be reading, to save memory that the next request
saves anyway.
"""

from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable
from hashlib import blake2b

from server.engine.sequence import BlockContent, BlockKey, Sequence

KEY_BYTES = 16


class BlockPool:
    """All KV blocks of the engine. Owned by the engine thread."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.is_caching = enable_prefix_caching
        self._num_holders = [0] * num_blocks
        # An OrderedDict and not a deque: a prefix hit takes a block out of the middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._published: list[BlockContent | None] = [None] * num_blocks
        self._index: dict[BlockKey, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks it takes to hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def holds_all(self, sequence: Sequence) -> bool:
        """Whether the sequence's block table is long enough for all its tokens."""
        return len(sequence.block_table) * self.block_size >= sequence.num_tokens

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """The longest run of published blocks that holds the sequence's beginning. Changes nothing.

        Never covers the last token: somebody has to compute it, for its logits.

        A sequence that waits for blocks is matched again at every step. So it takes the pool's entry for its
        own where they are equal, and next time sees at a glance that they are.
        """
        matched: list[int] = []
        if not self.is_caching:
            return matched
        for number in range((sequence.num_tokens - 1) // self.block_size):
            wanted = self._content(sequence, number)
            block = self._index.get(wanted.key)
            entry = None if block is None else self._published[block]
            if block is None or entry is None or (entry is not wanted and entry != wanted):
                break
            sequence.block_contents[number] = entry
            matched.append(block)
        return matched

    def shortage(self, sequence: Sequence, matched: Collection[int] = (), spare: int = 0) -> int:
        """How many blocks must be freed before `allocate`, for `spare` ones to be free after it."""
        num_new = self.blocks_for(sequence.num_tokens) - len(sequence.block_table) - len(matched)
        num_woken = sum(self._num_holders[block] == 0 for block in matched)
        return max(0, num_new + num_woken + spare - self.num_free)

    def allocate(self, sequence: Sequence, matched: Iterable[int] = ()) -> None:
        """Extend the block table to hold all tokens: first the matched blocks, whose tokens are computed,
        then new ones.

        The caller has made sure that there is no shortage.
        """
        for block in matched:
            if self._num_holders[block] == 0:
                del self._free[block]
            self._num_holders[block] += 1
            sequence.block_table.append(block)
            sequence.num_computed += self.block_size
        while not self.holds_all(sequence):
            sequence.block_table.append(self._take())

    def free(self, sequence: Sequence) -> None:
        """Give the sequence's blocks back, tail first, so that a shared prompt head is evicted last.

        Published blocks stay in the index. The sequence has nothing computed any more.
        """
        for block in reversed(sequence.block_table):
            self._num_holders[block] -= 1
            assert self._num_holders[block] >= 0
            if self._num_holders[block] == 0:
                self._free[block] = None
                if self._published[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.block_table.clear()
        sequence.num_computed = 0

    def publish(self, sequence: Sequence, num_before: int) -> None:
        """Offer the blocks that became full by computing positions [num_before, num_computed) to others.

        Only after the step that computed them has succeeded: so a sequence can be aborted at any time.
        """
        if not self.is_caching:
            return
        for number in range(num_before // self.block_size, sequence.num_computed // self.block_size):
            content = self._content(sequence, number)
            if content.key not in self._index:
                block = sequence.block_table[number]
                self._index[content.key] = block
                self._published[block] = content

    def retract(self, sequence: Sequence) -> None:
        """Offer none of the sequence's blocks any more: what it computed turned out to be unusable."""
        for block in sequence.block_table:
            self._unpublish(block)

    def check(self, tables: Iterable[list[int]]) -> None:
        """Recompute every count from the block tables of all living sequences."""
        holders = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a block twice in one table"
            for block in table:
                holders[block] += 1
        assert holders == self._num_holders, "holders"
        assert set(self._free) == {block for block, count in enumerate(holders) if count == 0}, "free order"
        by_key = {entry.key: block for block, entry in enumerate(self._published) if entry is not None}
        assert by_key == self._index, "prefix index"

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._unpublish(block)
        self._num_holders[block] = 1
        return block

    def _unpublish(self, block: int) -> None:
        content = self._published[block]
        if content is not None:
            del self._index[content.key]
            self._published[block] = None

    def _content(self, sequence: Sequence, number: int) -> BlockContent:
        """What the sequence's full block `number` holds. It is described once in the sequence's life."""
        contents = sequence.block_contents
        if number == len(contents):
            start = number * self.block_size
            tokens = tuple(sequence.tokens[start : start + self.block_size])
            parent = contents[number - 1].key if number else BlockKey(b"")
            if number == sequence.adapter_start // self.block_size:
                parent = BlockKey(parent + _salt(sequence))
            contents.append(BlockContent(_digest(parent, tokens), parent, tokens))
        return contents[number]


def _salt(sequence: Sequence) -> bytes:
    """What the adapters are and where they begin; nothing for the base model."""
    if sequence.adapter is None:
        return b""
    start = b"@%d" % sequence.adapter_start if sequence.adapter_start else b""
    return sequence.adapter.key + start


def _digest(parent: BlockKey, tokens: tuple[int, ...]) -> BlockKey:
    return BlockKey(blake2b(parent + array("q", tokens).tobytes(), digest_size=KEY_BYTES).digest())
