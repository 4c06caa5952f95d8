"""Which adapters of a step share a pack, and which are computed apart: a model of what each way costs.

    apart    calls per target + reading the adapter + its own tokens x its own parameters
    packed   calls per target + reading the pack    + all tokens     x all parameters of the pack

Many adapters with a token each belong in a pack, few with many tokens do not. Pure arithmetic, no tensors
are touched.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from adapters.run import Terms
from adapters.types import Revision, TargetId

if TYPE_CHECKING:
    from adapters.batch import LoraGroup

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
    def of(cls, linears: Mapping[TargetId, Terms]) -> "AdapterSize":
        """At least one."""
        return cls(
            num_parameters=sum(
                part.numel()
                for terms in linears.values()
                for part in (terms.a, terms.b, terms.gain, terms.bias)
                if part is not None
            ),
            num_targets=len(linears),
            rank=max(terms.a.shape[0] for terms in linears.values()),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """All tokens of a step that use an adapter, whatever else they use and at whatever scale."""

    revision: Revision
    num_tokens: int
    spans: tuple[tuple[int, int], ...]  # [start, stop) of tokens, ascending, not adjacent to each other
    groups: tuple["LoraGroup", ...]  # one for each scale

    @classmethod
    def of(cls, groups: Iterable["LoraGroup"]) -> "list[Demand]":
        """The demands of a step, sorted by revision as its groups are."""
        return [cls._of(revision, tuple(mine)) for revision, mine in groupby(groups, lambda g: g.revision)]

    @classmethod
    def _of(cls, revision: Revision, groups: tuple["LoraGroup", ...]) -> "Demand":
        if len(groups) == 1:
            return cls(revision, groups[0].num_tokens, groups[0].spans, groups)
        spans: list[tuple[int, int]] = []
        for start, stop in sorted(span for group in groups for span in group.spans):
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        return cls(revision, sum(group.num_tokens for group in groups), tuple(spans), groups)


@dataclass(frozen=True, slots=True)
class PackSize:
    """How much there is of a pack, made or imagined."""

    members: tuple[Revision, ...]  # sorted
    num_parameters: int
    num_targets: int  # of the member that has most

    @classmethod
    def of(cls, members: Iterable[Revision], sizes: Mapping[Revision, AdapterSize]) -> "PackSize":
        ordered = tuple(sorted(members))
        return cls(
            ordered,
            sum(sizes[member].num_parameters for member in ordered),
            max(sizes[member].num_targets for member in ordered),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to compute a step, and what the model says it costs."""

    us: float
    packs: dict[PackSize, list[Revision]]  # pack -> which of its members it serves
    apart: list[Revision]


@dataclass(frozen=True, slots=True)
class CostModel:
    """What products of a few rows cost. Only proportions matter, and a factor of two changes little."""

    call_us: float  # one product of any size, with what surrounds it
    read_per_us: float  # parameters
    products_per_us: float  # multiply-adds
    pack_call_us: float  # to lay one matrix out, of any size
    packed_per_us: float  # parameters, on top of that

    def choose(
        self,
        demands: Iterable[Demand],
        candidates: Iterable[PackSize],
        sizes: Mapping[Revision, AdapterSize],
    ) -> Choice:
        """Serve the demands with the given packs, greedily by what each saves; the rest apart."""
        rest = {demand.revision: demand for demand in demands}
        us = sum(self._apart_us(sizes[demand.revision], demand) for demand in rest.values())
        packs: dict[PackSize, list[Revision]] = {}
        left = [pack for pack in candidates if any(member in rest for member in pack.members)]
        while left:
            offers = [(*self._offer(pack, rest, sizes), pack) for pack in left]
            saved_us, served, pack = max(offers, key=lambda offer: offer[0])
            if saved_us <= 0.0:
                break
            us -= saved_us
            packs[pack] = served
            for revision in served:
                del rest[revision]
            left.remove(pack)
        return Choice(us, packs, list(rest))

    def partition(
        self, demands: Iterable[Demand], sizes: Mapping[Revision, AdapterSize], max_parameters: int
    ) -> list[PackSize]:
        """The packs that would suit a step, of at most `max_parameters` each.

        Adapters with few tokens, in the order of their revisions: an equal set always gives equal packs.
        """
        suited: list[Revision] = []
        num_parameters = 0
        for demand in sorted(demands, key=lambda demand: (demand.num_tokens, demand.revision)):
            size = sizes[demand.revision]
            if size.num_parameters > max_parameters:
                continue
            num_parameters += size.num_parameters
            if demand.num_tokens * num_parameters / self.products_per_us > self._apart_us(size, demand):
                break
            suited.append(demand.revision)
        packs: list[list[Revision]] = []
        room_rank = room_parameters = 0
        for revision in sorted(suited):
            size = sizes[revision]
            if not packs or size.rank > room_rank or size.num_parameters > room_parameters:
                packs.append([])
                room_rank, room_parameters = _MAX_PACK_RANK, max_parameters
            packs[-1].append(revision)
            room_rank -= size.rank
            room_parameters -= size.num_parameters
        return [PackSize.of(pack, sizes) for pack in packs]

    def packing_us(self, pack: PackSize) -> float:
        """To pack one target."""
        return 2 * self.pack_call_us + pack.num_parameters / pack.num_targets / self.packed_per_us

    def _offer(
        self, pack: PackSize, rest: Mapping[Revision, Demand], sizes: Mapping[Revision, AdapterSize]
    ) -> tuple[float, list[Revision]]:
        """What the pack would save, and on whom."""
        us_per_token = pack.num_parameters / self.products_per_us
        apart_us = {
            member: self._apart_us(sizes[member], rest[member]) for member in pack.members if member in rest
        }
        served = [member for member, us in apart_us.items() if us > rest[member].num_tokens * us_per_token]
        if not served:
            return 0.0, []
        start, stop, is_dense = extent([rest[member] for member in served])
        num_tokens = stop - start if is_dense else sum(rest[member].num_tokens for member in served)
        pack_us = self._products_us(
            pack.num_targets * (2 if is_dense else 4), pack.num_parameters, num_tokens
        )
        return sum(apart_us[member] for member in served) - pack_us, served

    def _apart_us(self, size: AdapterSize, demand: Demand) -> float:
        """What an adapter's tokens cost by themselves; a gather and a scatter if they are not adjacent."""
        num_calls = size.num_targets * (2 if len(demand.spans) == 1 else 4)
        return self._products_us(num_calls, size.num_parameters, demand.num_tokens)

    def _products_us(self, num_calls: int, num_parameters: int, num_tokens: int) -> float:
        """Reading and computing overlap."""
        busy_us = max(num_parameters / self.read_per_us, num_tokens * num_parameters / self.products_per_us)
        return num_calls * self.call_us + busy_us


# Measured with benchmarks/lora_kernels.py on one thread of a busy AMD EPYC (Zen 4, avx512_bf16), on the
# shape of Qwen2.5-0.5B, 168 targets, rank 16. bfloat16: one adapter apart 7 to 11 ms, sixteen in a pack 36
# to 38 ms; to pack one takes 39 ms, sixteen 105 ms. float32, where MKL's calls are short: sixteen apart
# 57 ms, in a pack 67 ms, so that only middling numbers of adapters, or scattered rows, are packed there.
BFLOAT16_COSTS = CostModel(18.0, 7_000.0, 100_000.0, 100.0, 2_000.0)
FLOAT32_COSTS = CostModel(3.5, 4_500.0, 35_000.0, 20.0, 1_000.0)


def extent(demands: list[Demand]) -> tuple[int, int, bool]:
    """First token, last token + 1, and whether it is better to take the tokens of others in between along."""
    start = min(demand.spans[0][0] for demand in demands)
    stop = max(demand.spans[-1][1] for demand in demands)
    return start, stop, stop - start <= 2 * sum(demand.num_tokens for demand in demands) + 4
