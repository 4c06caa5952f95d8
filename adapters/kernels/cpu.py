"""The CPU kernel: a few large products instead of many small ones.

A decode step has one token per sequence, and at worst as many adapters as tokens. Two small products per
adapter and target then cost more in calls than in arithmetic (16 adapters x 168 targets x 2 = 5376
calls). So adapters that are used together are copied into *packs* (packs.py), and one pair of products
serves them all; adapters with many tokens, as in prefill, are computed one by one (*apart*), where a pack
would multiply every token with every adapter.

Which way is cheaper follows from a small cost model (choice.py). When to copy is the ski rental problem,
because nobody knows how long a set of adapters stays together. So each step does as much of the copying
as it loses for want of the pack: sixteen adapters that decode together are packed in three or four steps, a
single newcomer over a dozen, and a set that changes all the time (prefill, arrivals) costs at worst twice
what it would without packs. No step copies for longer than a quarter of what its adapters cost as it is:
streams feel the longest step. A pack also serves any subset of its members, and what it wastes on those
that are not there counts as loss too, so that a smaller one replaces it in time.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters.kernels.choice import BFLOAT16_COSTS, FLOAT32_COSTS, AdapterSize, Demand, PackSize, extent
from adapters.kernels.cuda import add_group
from adapters.kernels.packs import (
    Layout,
    Pack,
    PackBuilder,
    PackCache,
    PackedTarget,
    PackOps,
    PlainOps,
    pick_ops,
)
from adapters.run import AdapterViews
from adapters.types import Revision, TargetId

if TYPE_CHECKING:
    from adapters.batch import LoraBatch, LoraGroup


_LARGE_ELEMENTS = 1 << 17
"""In float32 a call of oneDNN costs 15 us where MKL's costs 2 (16 rows, one thread of a Zen 4); at 64 x 896
elements MKL is still ahead with 25 us to 33, at 256 x 896 it is not any more with 92 to 85."""

_PACKING_SHARE = 0.25
"""Of a step's time for adapters. With sixteen, that is two thirds of the step: it gets a sixth longer."""


@dataclass(slots=True, eq=False)
class _Packed:
    """A pack at work in a step."""

    pack: Pack
    rows: slice | Tensor | None  # tokens that take part; None: all of the step
    scales: Tensor  # [n, members]: of each token's adapters, 0 for the others
    masks: dict[Layout, Tensor] = field(default_factory=dict)

    def mask(self, layout: Layout) -> Tensor:
        """[n, R]: each token's scale of the column's adapter. One per layout, not one per target."""
        mask = self.masks.get(layout)
        if mask is None:
            mask = self.masks[layout] = self.scales.index_select(1, layout.owners)
        return mask


@dataclass(slots=True, eq=False)
class _Step:
    """How one step is computed."""

    batch: "LoraBatch"
    packed: list[_Packed]
    apart: list[tuple["LoraGroup", AdapterViews]]
    us: float  # what the adapters cost
    wanted: list[PackSize]  # packs that would make it cheaper
    excess_us: float  # by how much

    def is_like(self, batch: "LoraBatch") -> bool:
        """Whether the same adapters have the same tokens, and still lie where they did."""
        mine, other = self.batch, batch
        return (
            mine.num_tokens == other.num_tokens
            and mine.arena is other.arena
            and [(group.revision, group.scale, group.spans) for group in mine.groups]
            == [(group.revision, group.scale, group.spans) for group in other.groups]
            and all(other.arena.adapter(group.revision) is views for group, views in self.apart)
        )


class CpuKernel:
    """Owns the packs; belongs to the engine thread."""

    def __init__(self, dtype: torch.dtype, pack_bytes: int) -> None:
        """`dtype` of the adapters. `pack_bytes`: memory for copies of those that are in use."""
        self._dtype = dtype
        self._costs = FLOAT32_COSTS if dtype is torch.float32 else BFLOAT16_COSTS
        self._large_ops = pick_ops(dtype)
        self._small_ops = PlainOps() if dtype is torch.float32 else self._large_ops
        self._cache = PackCache(pack_bytes)
        self._sizes: dict[Revision, AdapterSize] = {}
        self._step: _Step | None = None
        self._builder: PackBuilder | None = None
        self._credit_us = 0.0

    @property
    def num_pack_bytes(self) -> int:
        """Memory that copies of adapters take now."""
        return self._cache.num_bytes

    def add_lora(self, y: Tensor, x: Tensor, target: TargetId, batch: "LoraBatch") -> Tensor:
        step = self._step
        if step is None or step.batch is not batch:
            step = self._begin(batch)
        for packed in step.packed:
            matrices = packed.pack.targets.get(target)
            if matrices is not None:
                y = self._add_packed(y, x, packed, matrices)
        for group, views in step.apart:
            terms = views.linears.get(target)
            if terms is not None:
                add_group(y, x, terms, group)
        return y

    def forget(self, revision: Revision) -> None:
        if self._sizes.pop(revision, None) is not None:
            self._cache.keep(self._sizes)
        if self._builder is not None and revision in self._builder.size.members:
            self._builder = None  # the others' evictions must not keep it from ever being finished
        self._step = None

    @staticmethod
    def _add_packed(y: Tensor, x: Tensor, packed: _Packed, matrices: PackedTarget) -> Tensor:
        rows = packed.rows
        if rows is None:
            return _add_terms(y, x, packed, matrices)
        if isinstance(rows, slice):
            y[rows] = _add_terms(y[rows], x[rows], packed, matrices)
            return y
        theirs = _add_terms(y.index_select(0, rows), x.index_select(0, rows), packed, matrices)
        return y.index_copy_(0, rows, theirs)

    # --- Once per step ------------------------------------------------------------------------------------

    def _begin(self, batch: "LoraBatch") -> _Step:
        step = self._step
        if step is not None and step.is_like(batch):
            step.batch = batch  # decoding: the same rows as in the step before, so its masks hold too
        else:
            step = self._plan(batch)
        if step.wanted and self._invest(step.wanted[0], step, batch):
            step = self._plan(batch)
        for packed in step.packed:
            self._cache.use(packed.pack)
        self._step = step
        return step

    def _pick_ops(self, a: Tensor) -> PackOps:
        return self._small_ops if a.numel() < _LARGE_ELEMENTS else self._large_ops

    def _invest(self, wanted: PackSize, step: _Step, batch: "LoraBatch") -> bool:
        """Do as much of the packing as this step loses for want of the pack; whether it is there now."""
        adapters = {member: batch.arena.adapter(member).linears for member in wanted.members}
        builder = self._builder
        if builder is None or builder.size != wanted:
            builder = self._builder = PackBuilder(self._pick_ops, wanted, adapters)
            self._credit_us = 0.0
        packing_us = self._costs.packing_us(wanted)
        self._credit_us += step.excess_us
        at_most = max(1, int(_PACKING_SHARE * step.us / packing_us))
        num_targets = min(at_most, int(self._credit_us / packing_us))
        self._credit_us -= num_targets * packing_us
        pack = builder.build(num_targets, adapters)
        if pack is None:
            return False
        self._cache.add(pack)
        self._builder = None
        return True

    def _plan(self, batch: "LoraBatch") -> _Step:
        demands = Demand.of(group for group in batch.groups if batch.arena.adapter(group.revision).linears)
        for demand in demands:
            if demand.revision not in self._sizes:
                self._sizes[demand.revision] = AdapterSize.of(batch.arena.adapter(demand.revision).linears)
        # Half of the cache at most for one pack: the one that it replaces can stay until it is there.
        max_parameters = self._cache.capacity_bytes // self._dtype.itemsize // 2
        packs = {pack.size: pack for pack in self._cache.packs()}
        now = self._costs.choose(demands, packs, self._sizes)
        ideal = self._costs.partition(demands, self._sizes, max_parameters)
        best = self._costs.choose(demands, ideal, self._sizes)
        by_revision = {demand.revision: demand for demand in demands}
        return _Step(
            batch=batch,
            packed=[
                self._seat(packs[size], [by_revision[revision] for revision in served], batch)
                for size, served in now.packs.items()
            ],
            apart=[
                (group, batch.arena.adapter(revision))
                for revision in now.apart
                for group in by_revision[revision].groups
            ],
            us=now.us,
            wanted=[size for size in best.packs if size not in packs] if best.us < now.us else [],
            excess_us=now.us - best.us,
        )

    def _seat(self, pack: Pack, served: list[Demand], batch: "LoraBatch") -> _Packed:
        """Which tokens take part in the pack's products, and how much of which columns is theirs."""
        start, stop, is_dense = extent(served)
        owner_of = {revision: owner for owner, revision in enumerate(pack.size.members)}
        scales = torch.zeros(batch.num_tokens, len(owner_of), dtype=self._dtype)
        takes_part = torch.zeros(batch.num_tokens, dtype=torch.bool)
        for demand in served:
            for group in demand.groups:
                scales[group.rows, owner_of[demand.revision]] = group.scale
                takes_part[group.rows] = True
        if is_dense:
            rows = None if stop - start == batch.num_tokens else slice(start, stop)
            return _Packed(pack, rows, scales[start:stop])
        index = takes_part.nonzero().squeeze(1)
        return _Packed(pack, index, scales[index])


def _add_terms(y: Tensor, x: Tensor, packed: _Packed, matrices: PackedTarget) -> Tensor:
    """For the tokens that take part. Changes `y` or replaces it."""
    ops, gains, biases = matrices.ops, matrices.gains, matrices.biases
    if gains is not None:
        y.addcmul_(y, packed.mask(gains.layout) @ gains.values)
    if biases is not None:
        y.addmm_(packed.mask(biases.layout), biases.values)
    return ops.expand(ops.shrink(x, matrices.a, packed.mask(matrices.layout)), matrices.b, y)
