"""Rows of the embedding and of the head that an adapter has trained for some tokens
(`trainable_token_indices`): which tensors hold them, and for which tokens of which module they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapters.errors import AdapterIncompatible, AdapterInvalid
from adapters.names import Part, TensorName, format_key, shown
from adapters.safetensors_file import StoredTensor
from adapters.spec import LoraSpec, TokenIndices
from adapters.types import LinearTarget, ModelTargets, TargetId, TargetKind
from adapters.values import CONFIG_FILE

Parts = Mapping[Part, StoredTensor]


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of the embedding or the head in the order of `ids`."""

    target: TargetId
    linear: LinearTarget
    ids: tuple[int, ...]
    rows: StoredTensor  # [len(ids), width]
    is_tied: bool  # the embedding's own, for a head that is tied to it

    @property
    def width(self) -> int:
        return self.rows.shape[1]


def find_token_rows(
    spec: LoraSpec, targets: ModelTargets, modules: Mapping[str, Parts]
) -> Iterator[StoredRows]:
    """As PEFT ties them: a tied head gets the embedding's rows, unless it has been given others.

    Raises AdapterInvalid or AdapterIncompatible.
    """
    unclaimed = {module: parts[Part.ROWS] for module, parts in modules.items() if Part.ROWS in parts}
    asked: dict[TargetId, TokenIndices] = {}
    for indices in spec.token_indices:
        target = _end_named(indices.module, targets)
        if target in asked:
            raise AdapterInvalid(f"trainable_token_indices in {CONFIG_FILE} names one module twice")
        refuse_unknown_tokens("trainable_token_indices", indices.ids, targets)
        asked[target] = indices
    embedding, head = targets.embedding, targets.head
    is_shared = False
    if targets.is_tied and embedding is not None and head is not None and embedding in asked:
        is_shared = head not in asked or asked[head].ids == asked[embedding].ids
        if is_shared:
            asked.pop(head, None)
        elif spec.ensures_tying:
            raise AdapterInvalid(
                f"trainable_token_indices in {CONFIG_FILE} gives tied modules different tokens, against"
                " ensure_weight_tying"
            )
    for target, indices in asked.items():
        linear = targets.targets[target]
        rows = unclaimed.pop(linear.path, None)
        if rows is None:
            missing = shown(format_key(TensorName(linear.path, Part.ROWS)))
            raise AdapterInvalid(f"tensor {missing} is missing; {CONFIG_FILE} has trainable_token_indices")
        check_shape(rows, (len(indices.ids), table_shape(linear)[1]))
        yield StoredRows(target, linear, indices.ids, rows, is_tied=False)
        if is_shared and target == embedding and head is not None:
            yield StoredRows(head, targets.targets[head], indices.ids, rows, is_tied=True)
    for rows in unclaimed.values():
        raise AdapterInvalid(
            f"tensor {shown(rows.name)} is there, but {CONFIG_FILE} has no trainable_token_indices for it"
        )


def _end_named(name: str | None, targets: ModelTargets) -> TargetId:
    ends = [target for target in (targets.embedding, targets.head) if target is not None]
    if name is None:
        named = [target for target in ends if target == targets.embedding]
    else:
        named = [target for target in ends if name and targets.targets[target].path.endswith(name)]
    if len(named) != 1:
        raise AdapterIncompatible(
            f"trainable_token_indices in {CONFIG_FILE} is for {shown(name or 'the embedding')}, which is"
            " neither the embedding nor the output matrix of the served model"
        )
    return named[0]


def refuse_unknown_tokens(setting: str, ids: tuple[int, ...], targets: ModelTargets) -> None:
    """Raises AdapterIncompatible for ids beyond the served model's tokens."""
    ends = [target for target in (targets.embedding, targets.head) if target is not None]
    if not ids or not ends:
        return
    num_tokens = min(table_shape(targets.targets[target])[0] for target in ends)
    if max(ids) >= num_tokens:
        raise AdapterIncompatible(
            f"{setting} in {CONFIG_FILE} names token {max(ids)}; the served model has tokens 0 to"
            f" {num_tokens - 1} (adapters that add tokens to the model are not served)"
        )


def check_shape(tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    """Raises AdapterIncompatible."""
    if tensor.shape != expected:
        raise AdapterIncompatible(
            f"tensor {shown(tensor.name)} has shape {list(tensor.shape)};"
            f" the served model needs {list(expected)}"
        )


def table_shape(linear: LinearTarget) -> tuple[int, int]:
    """Tokens, and the width of their rows."""
    if linear.kind is TargetKind.EMBEDDING:
        return linear.in_features, linear.out_features
    return linear.out_features, linear.in_features
