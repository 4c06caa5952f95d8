"""What the files of an adapter hold, held against its config and the served model, before a number is read.

The header of the weights file names every tensor with its shape. From that follows all that the adapter is:
which targets it has at which rank, which tokens have rows of their own, and how much memory it takes. What
does not fit together is refused here, by the tensor's name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from adapters.errors import AdapterIncompatible, AdapterInvalid
from adapters.names import Part, TensorName, format_key, parse_key, shown
from adapters.safetensors_file import StoredTensor
from adapters.sources.local import WEIGHTS_FILE
from adapters.spec import LoraSpec
from adapters.trained_tokens import (
    Parts,
    StoredRows,
    check_shape,
    find_token_rows,
    refuse_unknown_tokens,
    table_shape,
)
from adapters.types import LinearTarget, ModelTargets, TargetId, TargetKind
from adapters.values import CONFIG_FILE

_HALVES = {
    TargetKind.LINEAR: (Part.A, Part.B),
    TargetKind.HEAD: (Part.A, Part.B),
    TargetKind.EMBEDDING: (Part.EMBEDDING_A, Part.EMBEDDING_B),
}
_KEPT_APART = (Part.ROWS, Part.BASE)  # these are no parts of a target's low-rank term
_USUAL_ENDS = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out", "output")


@dataclass(frozen=True, slots=True)
class StoredTerms:
    """One target of the adapter."""

    target: TargetId
    linear: LinearTarget
    rank: int
    scaling: float
    a: StoredTensor  # [rank, in], or [in, rank] if it is transposed
    b: StoredTensor  # [out, rank], or [rank, out] if it is transposed
    is_transposed: bool  # the embedding's own, turned round, for a head that is tied to it
    magnitude: StoredTensor | None
    bias: StoredTensor | None


@dataclass(frozen=True, slots=True)
class StoredBase:
    """A whole embedding or head, which must be the served model's own."""

    target: TargetId
    weight: StoredTensor  # [tokens, width]


@dataclass(slots=True)
class Inventory:
    """Everything that has to be read. Each list in the order of the targets."""

    terms: list[StoredTerms] = field(default_factory=list)
    token_rows: list[StoredRows] = field(default_factory=list)
    bases: list[StoredBase] = field(default_factory=list)

    def sort(self) -> None:
        for found in (self.terms, self.token_rows, self.bases):
            found.sort(key=lambda one: one.target)


def take_inventory(spec: LoraSpec, tensors: tuple[StoredTensor, ...], targets: ModelTargets) -> Inventory:
    """Raises AdapterInvalid or AdapterIncompatible."""
    modules = _by_module(tensors)
    if not modules:
        raise AdapterInvalid(f"{WEIGHTS_FILE} has no tensors")
    by_path = targets.by_path()
    found = Inventory()
    for module, parts in modules.items():
        target = by_path.get(module)
        if Part.BASE in parts:
            found.bases.append(_base(parts[Part.BASE], target, targets))
        if any(part not in _KEPT_APART for part in parts):
            found.terms.append(_terms(module, parts, spec, targets, by_path, modules))
    found.terms.extend(_tied_terms(spec, targets, modules))
    found.token_rows.extend(find_token_rows(spec, targets, modules))
    _refuse_what_peft_cannot_combine(spec, found)
    refuse_unknown_tokens("alora_invocation_tokens", spec.invocation_tokens, targets)
    found.sort()
    return found


def _by_module(tensors: tuple[StoredTensor, ...]) -> dict[str, dict[Part, StoredTensor]]:
    modules: dict[str, dict[Part, StoredTensor]] = {}
    for tensor in tensors:
        name = parse_key(tensor.name)
        parts = modules.setdefault(name.module, {})
        if name.part in parts:
            raise AdapterInvalid(f"tensor {shown(tensor.name)} is there twice, under two spellings")
        parts[name.part] = tensor
    return modules


def _terms(
    module: str,
    parts: Parts,
    spec: LoraSpec,
    targets: ModelTargets,
    by_path: Mapping[str, TargetId],
    modules: Mapping[str, Parts],
) -> StoredTerms:
    target = by_path.get(module)
    kind = _kind_by_name(parts) if target is None else targets.targets[target].kind
    wanted = dict.fromkeys(_HALVES[kind], "its other half is there")
    if spec.uses_dora:
        wanted[Part.MAGNITUDE] = f"use_dora is set in {CONFIG_FILE}"
    if spec.has_lora_bias:
        wanted[Part.BIAS] = f"lora_bias is set in {CONFIG_FILE}"
    for part, reason in wanted.items():
        if part not in parts:
            raise AdapterInvalid(f"tensor {_spelt(module, part)} is missing; {reason}")
    if target is None:
        raise AdapterIncompatible(_no_such_module(module, by_path, spec))
    linear = targets.targets[target]
    a, b = (parts[half] for half in _HALVES[kind])
    if not _is_targeted(linear, spec, targets, modules):
        raise AdapterInvalid(f"tensor {shown(a.name)} is for a module that {CONFIG_FILE} does not target")
    for part, tensor in parts.items():
        if part not in wanted and part not in _KEPT_APART:
            raise AdapterInvalid(
                f"tensor {shown(tensor.name)} is a {part.value}, which {CONFIG_FILE} does not ask for"
            )
    rank = _check_halves(a, b, linear, spec)
    for part in (Part.MAGNITUDE, Part.BIAS):
        if part in wanted:
            check_shape(parts[part], (linear.out_features,))
    return StoredTerms(
        target=target,
        linear=linear,
        rank=rank,
        scaling=spec.scaling(linear.path, rank),
        a=a,
        b=b,
        is_transposed=False,
        magnitude=parts.get(Part.MAGNITUDE),
        bias=parts.get(Part.BIAS),
    )


def _spelt(module: str, part: Part) -> str:
    return shown(format_key(TensorName(module, part)))


def _kind_by_name(parts: Parts) -> TargetKind:
    return TargetKind.EMBEDDING if Part.EMBEDDING_A in parts else TargetKind.LINEAR


def _is_targeted(
    linear: LinearTarget, spec: LoraSpec, targets: ModelTargets, modules: Mapping[str, Parts]
) -> bool:
    """Whether the config says that this module is adapted."""
    if linear.kind is TargetKind.HEAD and _ties_terms(spec, targets, modules):
        return True
    return not (spec.is_all_linear and linear.kind is not TargetKind.LINEAR) and spec.matches(linear.path)


def _ties_terms(spec: LoraSpec, targets: ModelTargets, modules: Mapping[str, Parts]) -> bool:
    """Whether what the embedding has also holds for the head."""
    if not (spec.ensures_tying and targets.is_tied) or targets.embedding is None or targets.head is None:
        return False
    return Part.EMBEDDING_A in modules.get(targets.targets[targets.embedding].path, {})


def _tied_terms(spec: LoraSpec, targets: ModelTargets, modules: Mapping[str, Parts]) -> Iterator[StoredTerms]:
    """The embedding's halves for the head, where the file does not spell them out."""
    if targets.head is None or targets.embedding is None or not _ties_terms(spec, targets, modules):
        return
    head = targets.targets[targets.head]
    if Part.A in modules.get(head.path, {}):
        return
    if spec.uses_dora:
        missing = _spelt(head.path, Part.MAGNITUDE)
        raise AdapterInvalid(f"tensor {missing} is missing; ensure_weight_tying is set in {CONFIG_FILE}")
    parts = modules[targets.targets[targets.embedding].path]
    a, b = parts[Part.EMBEDDING_A], parts[Part.EMBEDDING_B]
    rank = a.shape[0]
    yield StoredTerms(
        target=targets.head,
        linear=head,
        rank=rank,
        scaling=spec.scaling(head.path, rank),
        a=b,
        b=a,
        is_transposed=True,
        magnitude=None,
        bias=None,
    )


def _base(weight: StoredTensor, target: TargetId | None, targets: ModelTargets) -> StoredBase:
    if target is None or targets.targets[target].kind is TargetKind.LINEAR:
        raise AdapterInvalid(
            f"tensor {shown(weight.name)} is a whole weight of the base model, as of modules_to_save; an"
            " adapter may not replace it"
        )
    check_shape(weight, table_shape(targets.targets[target]))
    return StoredBase(target, weight)


def _refuse_what_peft_cannot_combine(spec: LoraSpec, found: Inventory) -> None:
    """Two changes of one module that PEFT itself cannot compute, or whose meaning it does not define."""
    adapted = {one.linear.kind for one in found.terms}
    with_rows = {one.linear.kind: one for one in found.token_rows}
    if spec.invocation_tokens and TargetKind.EMBEDDING in adapted:
        raise AdapterInvalid(
            "alora_invocation_tokens together with an adapter of the embedding is not served"
        )
    for kind in sorted(adapted & set(with_rows)):
        if spec.uses_dora or not with_rows[kind].is_tied:
            raise AdapterInvalid(
                f"trainable_token_indices together with an adapter of the same {kind.value} is not served"
            )


def _no_such_module(module: str, by_path: Mapping[str, TargetId], spec: LoraSpec) -> str:
    trained_on = "" if spec.base_model is None else f"; it was trained on {shown(spec.base_model)}"
    last = module.rpartition(".")[2]
    if last in _USUAL_ENDS:
        return f"the adapter targets {shown(module)}, which the served model does not have{trained_on}"
    known = sorted({path.rpartition(".")[2] for path in by_path})
    return (
        f"the adapter targets {shown(module)}, which is no linear layer of the served model"
        f" (its layers have: {', '.join(known[:16])}){trained_on}"
    )


def _check_halves(a: StoredTensor, b: StoredTensor, linear: LinearTarget, spec: LoraSpec) -> int:
    """The rank, which A's first dimension tells. Raises AdapterIncompatible or AdapterInvalid."""
    if len(a.shape) != 2 or len(b.shape) != 2:
        wrong = a if len(a.shape) != 2 else b
        raise AdapterInvalid(
            f"tensor {shown(wrong.name)} has shape {list(wrong.shape)}; two dimensions are expected"
        )
    rank = a.shape[0]
    if rank == 0 or b.shape[1] != rank:
        raise AdapterInvalid(
            f"tensors {shown(a.name)} {list(a.shape)} and {shown(b.name)} {list(b.shape)}"
            " do not agree about the rank"
        )
    check_shape(a, (rank, linear.in_features))
    check_shape(b, (linear.out_features, rank))
    said = spec.rank_of(linear.path)
    if said != rank:
        raise AdapterInvalid(f"tensor {shown(a.name)} has rank {rank}; {CONFIG_FILE} says {said}")
    return rank
