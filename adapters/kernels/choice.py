"""Which adapters of a step share a pack, and which are computed apart: a model of what each way costs.

    apart    calls per target + reading the adapter + its own tokens x its own parameters
    packed   calls per target + reading the pack    + all tokens     x all parameters of the pack

Many adapters with a token each belong in a pack, few with many tokens do not. Pure arithmetic, no tensors
are touched.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.types import Revision, TargetId
from adapters.weights import Pair

if TYPE_CHECKING:
    from adapters.batch import LoraGroup

# Measured with benchmarks/lora_kernels.py on an AMD EPYC (Zen 4, avx512_bf16, two busy cores) in bfloat16, on
# the shape of Qwen2.5-0.5B: 168 targets, rank 16. Only proportions matter; a factor of two changes little.
_CALL_US = 18.0  # a product of a few rows: one adapter apart, 336 calls, takes 6 to 8 ms
_READ_PER_US = 7_000.0  # parameters: sixteen adapters in a pack, 141 M parameters, take 20 ms
_PRODUCTS_PER_US = 100_000.0  # multiply-adds
_PACK_CALL_US = 100.0  # to re-order one matrix of any size: one adapter takes 39 ms to pack
_PACKED_PER_US = 2_000.0  # parameters, on top of that: sixteen adapters take 105 ms
_MAX_PACK_RANK = (
    512  # a pack multiplies all its tokens with all its columns: twice the rank, 4 times the work
)


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """How much there is of an adapter."""

    num_parameters: int
    num_targets: int
    rank: int  # the largest

    @classmethod
    def of(cls, pairs: Mapping[TargetId, Pair]) -> "AdapterSize":
        return cls(
            num_parameters=sum(a.numel() + b.numel() for a, b in pairs.values()),
            num_targets=len(pairs),
            rank=max(a.shape[0] for a, _ in pairs.values()),
        )

    def apart_us(self, group: "LoraGroup") -> float:
        """What its tokens cost by themselves."""
        num_calls = self.num_targets * (2 if len(group.spans) == 1 else 4)
        return _products_us(num_calls, self.num_parameters, group.num_tokens)


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to compute a step, and what the model says it costs."""

    us: float
    packs: dict[tuple[Revision, ...], list[Revision]]  # pack -> which of its members it serves
    apart: list[Revision]


def choose(
    groups: Iterable["LoraGroup"],
    candidates: Iterable[tuple[Revision, ...]],
    sizes: Mapping[Revision, AdapterSize],
) -> Choice:
    """Serve the groups with the given packs, greedily by what each saves; the rest apart."""
    rest = {group.revision: group for group in groups}
    us = sum(sizes[group.revision].apart_us(group) for group in rest.values())
    packs: dict[tuple[Revision, ...], list[Revision]] = {}
    open_candidates = [members for members in candidates if any(member in rest for member in members)]
    while open_candidates:
        offers = [(*_offer(members, rest, sizes), members) for members in open_candidates]
        saved_us, served, members = max(offers, key=lambda offer: offer[0])
        if saved_us <= 0.0:
            break
        us -= saved_us
        packs[members] = served
        for revision in served:
            del rest[revision]
        open_candidates.remove(members)
    return Choice(us, packs, list(rest))


def _offer(
    members: tuple[Revision, ...], rest: Mapping[Revision, "LoraGroup"], sizes: Mapping[Revision, AdapterSize]
) -> tuple[float, list[Revision]]:
    """What the pack would save, and on whom."""
    us_per_token = _parameters(members, sizes) / _PRODUCTS_PER_US
    served = [
        rest[member]
        for member in members
        if member in rest and sizes[member].apart_us(rest[member]) > rest[member].num_tokens * us_per_token
    ]
    if not served:
        return 0.0, []
    start, stop, is_dense = extent(served)
    num_tokens = stop - start if is_dense else sum(group.num_tokens for group in served)
    num_targets = max(sizes[member].num_targets for member in members)
    cost_us = _products_us(num_targets * (2 if is_dense else 4), _parameters(members, sizes), num_tokens)
    saved_us = sum(sizes[group.revision].apart_us(group) for group in served) - cost_us
    return saved_us, [group.revision for group in served]


def _parameters(members: tuple[Revision, ...], sizes: Mapping[Revision, AdapterSize]) -> int:
    return sum(sizes[member].num_parameters for member in members)


def extent(groups: list["LoraGroup"]) -> tuple[int, int, bool]:
    """First token, last token + 1, and whether it is better to take the tokens of others in between along."""
    start = min(group.spans[0][0] for group in groups)
    stop = max(group.spans[-1][1] for group in groups)
    return start, stop, stop - start <= 2 * sum(group.num_tokens for group in groups) + 4


def partition(
    groups: Iterable["LoraGroup"], sizes: Mapping[Revision, AdapterSize], max_parameters: int
) -> list[tuple[Revision, ...]]:
    """The packs that would suit a step: adapters with few tokens, in the order of their revisions, so that an
    equal set always gives equal packs. `max_parameters`: room for all packs; one may take half of it, so that
    the one that it replaces can stay until it is there."""
    suited: list[Revision] = []
    num_parameters = 0
    for group in sorted(groups, key=lambda group: (group.num_tokens, group.revision)):
        size = sizes[group.revision]
        num_parameters += size.num_parameters
        if group.num_tokens * num_parameters / _PRODUCTS_PER_US > size.apart_us(group):
            break
        suited.append(group.revision)
    packs: list[list[Revision]] = []
    room_rank = room_parameters = 0
    for revision in sorted(suited):
        size = sizes[revision]
        if not packs or size.rank > room_rank or size.num_parameters > room_parameters:
            packs.append([])
            room_rank, room_parameters = _MAX_PACK_RANK, max_parameters // 2
        packs[-1].append(revision)
        room_rank -= size.rank
        room_parameters -= size.num_parameters
    return [tuple(pack) for pack in packs]


def packing_us(members: tuple[Revision, ...], sizes: Mapping[Revision, AdapterSize]) -> float:
    """What it costs to make a pack."""
    num_targets = max(sizes[member].num_targets for member in members)
    return 2 * num_targets * _PACK_CALL_US + _parameters(members, sizes) / _PACKED_PER_US


def _products_us(num_calls: int, num_parameters: int, num_tokens: int) -> float:
    """Reading and computing overlap."""
    busy_us = max(num_parameters / _READ_PER_US, num_tokens * num_parameters / _PRODUCTS_PER_US)
    return num_calls * _CALL_US + busy_us
