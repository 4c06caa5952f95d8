"""Several adapters merged into one, as PEFT's `add_weighted_adapter` does it: A and B each by itself.

    A = combine(sign(u1) sqrt|u1| A1, ...)     B = combine(sqrt|u1| B1, ...)     u = weight * scaling

`combine` is PEFT's own: a sum, or what TIES and DARE make of one (see recipes.py). A target that only some of
the adapters have is combined from those. Host copies have the scaling in B, so it is taken out first; the
merged adapter's own scaling is 1.

What DARE drops is drawn by a generator that is seeded with the merge's key: the same merge is the same
adapter on every server, today and tomorrow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from adapters.conversion import MAX_MAGNITUDE
from adapters.errors import AdapterIncompatible, AdapterTooLarge
from adapters.host_memory import Allocate, ordinary
from adapters.names import shown
from adapters.recipes import MergeMethod, MergeRecipe
from adapters.run import Pair, RunPlacer, make_pair
from adapters.types import LoraEntry, ModelTargets, Revision, TargetId
from adapters.weights import LoraWeights


@dataclass(frozen=True, slots=True)
class _Half:
    """One half, A or B, of a target: those of all adapters that have the target, and what each counts."""

    tensors: list[Tensor]
    weights: list[float]


def merge_weights(
    recipe: MergeRecipe,
    names: Sequence[str],
    adapters: Sequence[LoraWeights],
    *,
    targets: ModelTargets,
    max_bytes: int,
    allocate: Allocate = ordinary,
) -> LoraWeights:
    """Plain adapters to one, whose revision is the merge's key. `names` are for messages; `allocate` makes
    the run.

    Raises AdapterIncompatible for ranks that differ at a target, and for a result that cannot be served;
    AdapterTooLarge for one beyond `max_bytes`.
    """
    key = recipe.key([one.revision for one in adapters])
    united = sorted({target for one in adapters for target in one.entries})
    ranks = {target: _rank(target, names, adapters, targets) for target in united}
    dtype = adapters[0].run.dtype
    entries, num_bytes = _lay_out(ranks, targets, dtype)
    if num_bytes > max_bytes:
        raise AdapterTooLarge(f"the merged adapter needs {num_bytes} bytes; adapters may take {max_bytes}")
    run = allocate(num_bytes // dtype.itemsize, dtype)
    combine = _Combine(recipe, int(key[:15], 16))
    for target, entry in entries.items():
        merged = [combine(half) for half in _halves(target, recipe.weights, adapters)]
        for place, values in zip(make_pair(run, entry), merged, strict=True):
            place.copy_(values)
            _check_values(place)
    paths = (targets.targets[target].path for target in united)
    return replace(
        adapters[0],
        revision=Revision(key),
        run=run,
        entries=entries,
        rank=max(ranks.values()),
        target_names=tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths)),
        num_bytes=num_bytes,
        kinds=("merged",),
    )


class _Combine:
    """PEFT's combination of tensors, with dice of its own."""

    def __init__(self, recipe: MergeRecipe, seed: int) -> None:
        self._recipe = recipe
        self._method = recipe.effective_method
        self._dice = torch.Generator().manual_seed(seed)
        self._peft = _peft_functions()

    def __call__(self, half: _Half) -> Tensor:
        kept = [self._prune(tensor) for tensor in half.tensors]
        weights = torch.tensor(half.weights, dtype=torch.float32)
        if not self._method.elects_sign:
            combined: Tensor = self._peft.task_arithmetic(kept, weights)
            return combined
        stacked = torch.stack(kept)
        agreeing = self._peft.calculate_majority_sign_mask(stacked, str(self._recipe.majority_sign))
        weighted = stacked * self._peft.reshape_weight_task_tensors(stacked, weights)
        elected: Tensor = self._peft.disjoint_merge(weighted, agreeing)
        return elected

    def _prune(self, tensor: Tensor) -> Tensor:
        density = self._recipe.density
        if not self._method.drops_some or density >= 1.0:
            return tensor
        if self._method is MergeMethod.TIES:
            largest: Tensor = self._peft.magnitude_based_pruning(tensor, density)
            return largest
        # PEFT's function draws from the generator that all threads share.
        mask = torch.bernoulli(torch.full_like(tensor, density), generator=self._dice)
        return tensor * mask / density


def _halves(
    target: TargetId, weights: Sequence[float], adapters: Sequence[LoraWeights]
) -> tuple[_Half, _Half]:
    half_a, half_b = _Half([], []), _Half([], [])
    for weight, one in zip(weights, adapters, strict=True):
        pair = one.view(target)
        if pair is not None:
            scaling = one.entries[target].scaling
            a, b = _unscaled(pair, scaling)
            share = math.sqrt(abs(weight * scaling))
            half_a.tensors.append(a)
            half_a.weights.append(-share if weight * scaling < 0 else share)
            half_b.tensors.append(b)
            half_b.weights.append(share)
    return half_a, half_b


def _unscaled(pair: Pair, scaling: float) -> Pair:
    """float32 A and B as they were trained. An adapter that is scaled to nothing has nothing to give."""
    a, b = (half.to(torch.float32) for half in pair)
    return a, b / scaling if scaling else b


def _rank(
    target: TargetId, names: Sequence[str], adapters: Sequence[LoraWeights], targets: ModelTargets
) -> int:
    """That of all adapters that have the target. Raises AdapterIncompatible."""
    ranks = {
        name: entry.rank
        for name, one in zip(names, adapters, strict=True)
        if (entry := one.entries.get(target)) is not None
    }
    if len(set(ranks.values())) > 1:
        said = ", ".join(f"{shown(name)} has {rank}" for name, rank in ranks.items())
        raise AdapterIncompatible(
            f"adapters can only be merged if their ranks agree; at {targets.targets[target].path} {said}"
        )
    return next(iter(ranks.values()))


def _lay_out(
    ranks: Mapping[TargetId, int], targets: ModelTargets, dtype: torch.dtype
) -> tuple[dict[TargetId, LoraEntry], int]:
    """Places of all pieces, and the length of the run in bytes."""
    placer = RunPlacer(dtype)
    entries: dict[TargetId, LoraEntry] = {}
    for target, rank in ranks.items():
        linear = targets.targets[target]
        offset_a = placer.place(rank * linear.in_features)
        offset_b = placer.place(linear.out_features * rank)
        entries[target] = LoraEntry(rank, linear.in_features, linear.out_features, offset_a, offset_b)
    return entries, placer.num_bytes


def _check_values(values: Tensor) -> None:
    """As served. Raises AdapterIncompatible."""
    largest = float(values.abs().max())
    if not largest <= MAX_MAGNITUDE:  # NaN is not
        raise AdapterIncompatible("the merged adapter holds values that are too large to be served")


def _peft_functions() -> ModuleType:
    """`peft.utils.merge_utils` and nothing else: to import all of PEFT takes seconds, and stalls a server."""
    package = find_spec("peft")
    assert package is not None, "peft is installed"
    assert package.origin is not None, "and has files"
    module = ModuleType("merge_utils")
    file = Path(package.origin).parent / "utils" / "merge_utils.py"
    SourceFileLoader(module.__name__, str(file)).exec_module(module)
    return module
