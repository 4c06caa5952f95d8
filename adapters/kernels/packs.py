"""Several adapters side by side in one pair of matrices per target, laid out for the CPU.

    A of a  [ 8, in]                                     columns      a a a a a a a a b b b b
    A of b  [ 4, in]   -> A [12, in], B [out, 12]        token of a   1 1 1 1 1 1 1 1 0 0 0 0
                                                         token of b   0 0 0 0 0 0 0 0 s s s s    at scale s

    y += ((x A^T) * mask) B^T

Two products serve all adapters of the pack, whatever the order of the tokens, and both element-wise
operations ride along inside of them. A mask of zeros adds exactly nothing; a token of several adapters has
the scale of each in its columns. Gains and biases are vectors of some members, picked for the tokens by a
product with a mask of the same kind.

oneDNN reads a weight that was re-ordered beforehand about twice as fast as `F.linear` reads a plain one in
bfloat16. Its operators are torch inductor's own and undocumented, so they are tried against plain torch when
the kernel is made, and replaced by it if anything is unexpected.
"""

from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.kernels.choice import PackSize
from adapters.run import Terms
from adapters.types import Revision, TargetId


class PackOps(Protocol):
    """The two products, over matrices in a layout of their own."""

    def pack(self, matrix: Tensor) -> Tensor:
        """`matrix` [out, in] in the layout that the products take."""
        ...

    def shrink(self, x: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        """(x A^T) * mask: x [T, I], A packed [R, I], mask [T, R]."""
        ...

    def expand(self, h: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """y + h B^T: h [T, R], B packed [O, R], y [T, O]; may be y itself, changed."""
        ...


class OneDnnOps:
    """Re-ordered weights, and the mask and the sum as post-operations."""

    def __init__(self) -> None:
        self._pack = torch.ops.mkldnn._reorder_linear_weight
        self._product = torch.ops.mkldnn._linear_pointwise.binary

    def pack(self, matrix: Tensor) -> Tensor:
        packed: Tensor = self._pack(matrix, None)
        return packed

    def shrink(self, x: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = self._product(x, mask, a, None, "mul")
        return result

    def expand(self, h: Tensor, b: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self._product(h, y, b, None, "add")
        return result


class PlainOps:
    """What every torch can do."""

    def pack(self, matrix: Tensor) -> Tensor:
        return matrix

    def shrink(self, x: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        return F.linear(x, a).mul_(mask)

    def expand(self, h: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return y.addmm_(h, b.t())


def pick_ops(dtype: torch.dtype) -> PackOps:
    """oneDNN's if this machine has them for the dtype and they compute what they should."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch._C._has_mkldnn:
        return PlainOps()
    try:
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return PlainOps()
        ops = OneDnnOps()
        return ops if _agrees_with_torch(ops, dtype) else PlainOps()
    except (AttributeError, RuntimeError):
        return PlainOps()


def _agrees_with_torch(ops: PackOps, dtype: torch.dtype) -> bool:
    """On numbers that every element matters for; odd sizes, because they take other paths inside."""
    with torch.inference_mode():
        for num_tokens, num_in, rank, num_out in ((1, 33, 5, 17), (7, 64, 16, 48)):
            x, a, b, y = (
                torch.sin(torch.arange(rows * columns, dtype=torch.float32) * step)
                .view(rows, columns)
                .to(dtype)
                for rows, columns, step in (
                    (num_tokens, num_in, 0.37),
                    (rank, num_in, 0.61),
                    (num_out, rank, 0.83),
                    (num_tokens, num_out, 0.29),
                )
            )
            mask = (torch.arange(num_tokens * rank) % 3 > 0).view(num_tokens, rank).to(dtype)
            got = ops.expand(ops.shrink(x, ops.pack(a), mask), ops.pack(b), y.clone()).float()
            expected = y.float() + ((x.float() @ a.float().t()) * mask.float()) @ b.float().t()
            tolerance = 1e-5 if dtype is torch.float32 else 3e-2
            if not float((got - expected).abs().max()) <= tolerance * float(expected.abs().max()):
                return False
    return True


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which member of the pack each column belongs to. Targets with like columns share one, and its mask."""

    owners: Tensor  # int64 [R], position in PackSize.members


@dataclass(frozen=True, slots=True, eq=False)
class PackedTarget:
    """One target of a pack."""

    ops: PackOps  # whose layout A and B have
    a: Tensor  # packed [R, in]
    b: Tensor  # packed [out, R]
    layout: Layout
    gains: "Vectors | None"
    biases: "Vectors | None"


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """A vector [out] of each member that has one."""

    values: Tensor  # [k, out]
    layout: Layout  # whose they are


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """A set of adapters, copied side by side."""

    size: PackSize
    targets: Mapping[TargetId, PackedTarget]
    num_bytes: int


Adapters = Mapping[Revision, Mapping[TargetId, Terms]]
"""What some adapters have for their linear targets."""


class PackBuilder:
    """A pack in the making, target by target, so that the work can be spread over steps."""

    def __init__(self, pick: Callable[[Tensor], PackOps], size: PackSize, adapters: Adapters) -> None:
        """`pick` the products for a target, by its A [R, in]."""
        self.size = size
        self._pick = pick
        self._open = sorted({target for linears in adapters.values() for target in linears}, reverse=True)
        self._layouts: dict[tuple[tuple[int, int], ...], Layout] = {}
        self._targets: dict[TargetId, PackedTarget] = {}
        self._num_bytes = 0

    def build(self, num_targets: int, adapters: Adapters) -> Pack | None:
        """Do some more; the pack when it is complete. The adapters may lie elsewhere than before."""
        for _ in range(min(num_targets, len(self._open))):
            self._build_one(self._open.pop(), adapters)
        return None if self._open else Pack(self.size, self._targets, self._num_bytes)

    def _build_one(self, target: TargetId, adapters: Adapters) -> None:
        """Side by side, at the ranks that the adapters really have here."""
        parts = [
            (owner, adapters[member][target])
            for owner, member in enumerate(self.size.members)
            if target in adapters[member]
        ]
        layout = self._layout([(owner, terms.a.shape[0]) for owner, terms in parts])
        a = torch.cat([terms.a for _, terms in parts])
        b = torch.cat([terms.b for _, terms in parts], dim=1)
        gains = self._stack([(owner, terms.gain) for owner, terms in parts])
        biases = self._stack([(owner, terms.bias) for owner, terms in parts])
        ops = self._pick(a)
        self._targets[target] = PackedTarget(ops, ops.pack(a), ops.pack(b), layout, gains, biases)
        self._num_bytes += a.nbytes + b.nbytes
        self._num_bytes += sum(vectors.values.nbytes for vectors in (gains, biases) if vectors is not None)

    def _layout(self, columns: list[tuple[int, int]]) -> Layout:
        """`columns`: (owner, how many), side by side."""
        key = tuple(columns)
        if key not in self._layouts:
            owners = [owner for owner, count in columns for _ in range(count)]
            self._layouts[key] = Layout(torch.tensor(owners, dtype=torch.int64))
        return self._layouts[key]

    def _stack(self, vectors: list[tuple[int, Tensor | None]]) -> Vectors | None:
        there = [(owner, vector) for owner, vector in vectors if vector is not None]
        if not there:
            return None
        values = torch.stack([vector for _, vector in there])
        return Vectors(values, self._layout([(owner, 1) for owner, _ in there]))


class PackCache:
    """Packs by their members, bounded in bytes; the one that was not used for longest goes first."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self._packs: OrderedDict[tuple[Revision, ...], Pack] = OrderedDict()

    def packs(self) -> tuple[Pack, ...]:
        return tuple(self._packs.values())

    def use(self, pack: Pack) -> None:
        self._packs.move_to_end(pack.size.members)

    def add(self, pack: Pack) -> None:
        """It must not be there yet, nor be larger than the whole cache."""
        assert pack.num_bytes <= self.capacity_bytes and pack.size.members not in self._packs  # noqa: PT018
        while self.num_bytes + pack.num_bytes > self.capacity_bytes:
            _, oldest = self._packs.popitem(last=False)
            self.num_bytes -= oldest.num_bytes
        self._packs[pack.size.members] = pack
        self.num_bytes += pack.num_bytes

    def keep(self, live: Container[Revision]) -> None:
        """Drop the packs of which no adapter is live. Others still serve those that are."""
        for members in [members for members in self._packs if not any(member in live for member in members)]:
            self.num_bytes -= self._packs.pop(members).num_bytes
