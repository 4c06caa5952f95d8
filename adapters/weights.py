"""A PEFT folder turned into one run of numbers that any arena can take as it is.

What the files hold is checked first (inventory.py), then every piece gets its place in the run (run.py), then
the numbers are read into their places. All that can be worked out once is: the scale, an embedding's own
factor and DoRA's are folded into B, in float32, before the numbers are cast to the served dtype. Whatever is
wrong with a folder is an AdapterError that names the tensor; nothing else may come out of here, whatever is
in the files.

The header of the weights file alone tells how large an adapter is: its outline, for those who want to know
before they make room.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.base import BaseWeights
from adapters.errors import AdapterInvalid, AdapterTooLarge
from adapters.filling import Filler, check_bases
from adapters.host_memory import Allocate, ordinary
from adapters.inventory import Inventory, StoredTerms, take_inventory
from adapters.run import Pair, RunLayout, RunPlacer, make_pair
from adapters.safetensors_file import SafetensorsFile
from adapters.sources.files import WEIGHTS_FILE, refuse_pickles
from adapters.spec import LoraSpec
from adapters.types import (
    LoraEntry,
    ModelTargets,
    Outline,
    Revision,
    TargetId,
    TargetKind,
    TokenRowsEntry,
)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """A validated adapter in host memory. Immutable; the tensors are never written again."""

    revision: Revision
    run: torch.Tensor  # one dimension, served dtype, contiguous, aligned
    entries: Mapping[TargetId, LoraEntry]  # in the order of the run
    rank: int  # the largest; 0 for one that only has rows of tokens
    target_names: tuple[str, ...]  # distinct last parts of the module paths, in model order
    num_bytes: int  # of the run, a multiple of ALIGNMENT_BYTES
    kinds: tuple[str, ...] = ()  # sorted; () is plain LoRA, else see `_kinds`
    invocation_tokens: tuple[int, ...] = ()  # aLoRA: active from the last place where they stand
    token_rows: tuple[TokenRowsEntry, ...] = ()

    @property
    def layout(self) -> RunLayout:
        return RunLayout(self.entries, self.token_rows)

    def view(self, target: TargetId) -> Pair | None:
        """A and B."""
        entry = self.entries.get(target)
        return None if entry is None else make_pair(self.run, entry)


def load_weights(
    folder: Path,
    targets: ModelTargets,
    dtype: torch.dtype,
    max_bytes: int,
    base: BaseWeights | None = None,
    *,
    allocate: Allocate = ordinary,
) -> LoraWeights:
    """Read, check and convert the adapter in `folder`; at most `max_bytes` in the served dtype.

    `base`: the served model's weights; without them, adapters that depend on them are refused. `allocate`
    makes the run. Raises AdapterInvalid, AdapterIncompatible or AdapterTooLarge.
    """
    refuse_pickles(folder)
    spec = LoraSpec.from_folder(folder)
    with SafetensorsFile(folder / WEIGHTS_FILE) as file:
        found = take_inventory(spec, file.tensors, targets)
        layout, outline = _lay_out(spec, found, targets, dtype, max_bytes)
        if spec.uses_dora and base is None:
            raise AdapterInvalid("use_dora needs the weights of the served model, which are not at hand")
        check_bases(file, found.bases, base)
        run = allocate(outline.num_bytes // dtype.itemsize, dtype)
        filler = Filler(file, run, layout, base)
        for terms in found.terms:
            filler.fill_terms(terms, targets.embed_scale)
        for entry, rows in zip(layout.token_rows, found.token_rows, strict=True):
            filler.fill_token_rows(rows, entry, targets.embed_scale)
        filler.count("invocation tokens", spec.invocation_tokens)
        revision = filler.finish()
    return LoraWeights(
        revision=revision,
        run=run,
        entries=layout.entries,
        rank=outline.rank,
        target_names=outline.target_names,
        num_bytes=outline.num_bytes,
        kinds=outline.kinds,
        invocation_tokens=spec.invocation_tokens,
        token_rows=layout.token_rows,
    )


def read_outline(folder: Path, targets: ModelTargets, dtype: torch.dtype, max_bytes: int) -> Outline:
    """What `load_weights` would say of the adapter in `folder`, without reading its numbers.

    Raises as it does, but for what only the numbers can show.
    """
    refuse_pickles(folder)
    spec = LoraSpec.from_folder(folder)
    with SafetensorsFile(folder / WEIGHTS_FILE) as file:
        found = take_inventory(spec, file.tensors, targets)
    return _lay_out(spec, found, targets, dtype, max_bytes)[1]


def _lay_out(
    spec: LoraSpec, found: Inventory, targets: ModelTargets, dtype: torch.dtype, max_bytes: int
) -> tuple[RunLayout, Outline]:
    """Places of all pieces, and how large the whole is. Raises AdapterTooLarge."""
    placer = RunPlacer(dtype)
    entries = {one.target: _place(placer, one) for one in found.terms}
    rows: list[TokenRowsEntry] = []
    for one in found.token_rows:
        if one.is_tied and targets.embed_scale == 1.0:  # the very numbers of the embedding, which come first
            first = rows[-1]
            ids, numbers = first.offset_ids, first.offset_rows
        else:
            ids, numbers = placer.place_ids(len(one.ids)), placer.place(one.rows.num_elements)
        rows.append(TokenRowsEntry(len(one.ids), one.width, ids, numbers, one.linear.kind))
    outline = Outline(
        rank=max((entry.rank for entry in entries.values()), default=0),
        target_names=tuple(dict.fromkeys(one.linear.path.rpartition(".")[2] for one in found.terms)),
        num_bytes=placer.num_bytes,
        kinds=_kinds(spec, found),
    )
    if outline.num_bytes > max_bytes:
        raise AdapterTooLarge(f"the adapter needs {outline.num_bytes} bytes; adapters may take {max_bytes}")
    return RunLayout(entries, tuple(rows)), outline


def _place(placer: RunPlacer, one: StoredTerms) -> LoraEntry:
    is_dora = one.magnitude is not None
    has_bias = one.linear.has_bias if is_dora else one.bias is not None
    offset_a, offset_b = placer.place(one.a.num_elements), placer.place(one.b.num_elements)
    return LoraEntry(
        rank=one.rank,
        in_features=one.linear.in_features,
        out_features=one.linear.out_features,
        offset_a=offset_a,
        offset_b=offset_b,
        scaling=one.scaling,
        offset_gain=placer.place(one.linear.out_features) if is_dora else None,
        offset_bias=placer.place(one.linear.out_features) if has_bias else None,
        kind=one.linear.kind,
    )


def _kinds(spec: LoraSpec, found: Inventory) -> tuple[str, ...]:
    """What is more than plain LoRA: some of rslora, dora, alora, lora_bias, embedding, head, token_rows."""
    adapted = {one.linear.kind for one in found.terms}
    kinds = {
        "rslora": spec.uses_rslora,
        "dora": spec.uses_dora,
        "alora": bool(spec.invocation_tokens),
        "lora_bias": spec.has_lora_bias,
        "embedding": TargetKind.EMBEDDING in adapted,
        "head": TargetKind.HEAD in adapted,
        "token_rows": bool(found.token_rows),
    }
    return tuple(sorted(kind for kind, is_one in kinds.items() if is_one))
