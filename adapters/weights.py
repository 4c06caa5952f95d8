"""A PEFT folder turned into one run of numbers that any arena can take as it is.

    run   | A of target 3 | B of target 3 | A of target 7 | B of target 7 | ...
            [r, in]         [out, r]        in model order; every piece begins at a multiple of 64 bytes

Every piece has the rank that its module really has; modules without an adapter take no room. The scale is
folded into B once, in float32, before the numbers are cast to the served dtype. Whatever is wrong with a
folder is an AdapterError that names the tensor; nothing else may come out of here, whatever is in the
files.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.conversion import Piece, convert
from adapters.errors import AdapterIncompatible, AdapterInvalid, AdapterTooLarge
from adapters.host_memory import Allocate, ordinary
from adapters.names import Half, TensorName, format_key, parse_key, shown
from adapters.placement import ALIGNMENT_BYTES
from adapters.safetensors_file import SafetensorsFile, StoredTensor
from adapters.sources import WEIGHTS_FILE, refuse_pickles
from adapters.spec import LoraSpec
from adapters.types import LinearTarget, LoraEntry, ModelTargets, Revision, TargetId

_DIGEST_BYTES = 16

Pair = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank]."""


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """A validated adapter in host memory. Immutable; the tensors are never written again."""

    revision: Revision
    run: Tensor  # one dimension, served dtype, contiguous, aligned
    entries: Mapping[TargetId, LoraEntry]  # in the order of the run
    rank: int  # the largest
    target_names: tuple[str, ...]  # distinct last parts of the module paths, in model order
    num_bytes: int  # of the run, a multiple of ALIGNMENT_BYTES

    def view(self, target: TargetId) -> Pair | None:
        entry = self.entries.get(target)
        return None if entry is None else make_pair(self.run, entry)


@dataclass(frozen=True, slots=True)
class _Planned:
    """One target of the adapter before its numbers are read."""

    target: TargetId
    linear: LinearTarget
    a: StoredTensor
    b: StoredTensor
    scaling: float


def load_weights(
    folder: Path,
    targets: ModelTargets,
    dtype: torch.dtype,
    max_bytes: int,
    *,
    allocate: Allocate = ordinary,
) -> LoraWeights:
    """Read, check and convert the adapter in `folder`; at most `max_bytes` in the served dtype.

    `allocate` makes the run. Raises AdapterInvalid, AdapterIncompatible or AdapterTooLarge.
    """
    refuse_pickles(folder)
    spec = LoraSpec.from_folder(folder)
    with SafetensorsFile(folder / WEIGHTS_FILE) as file:
        planned = _plan(spec, file.tensors, targets)
        entries, num_bytes = _lay_out(planned, dtype)
        if num_bytes > max_bytes:
            raise AdapterTooLarge(f"the adapter needs {num_bytes} bytes; adapters may take {max_bytes}")
        run = allocate(num_bytes // dtype.itemsize, dtype)
        if run.numel() > sum(one.a.num_elements + one.b.num_elements for one in planned):
            run.zero_()  # what lies between the pieces
        revision = _fill(file, planned, run, entries)
    return LoraWeights(
        revision=revision,
        run=run,
        entries=entries,
        rank=max(entry.rank for entry in entries.values()),
        target_names=tuple(dict.fromkeys(one.linear.path.rpartition(".")[2] for one in planned)),
        num_bytes=num_bytes,
    )


def make_pair(run: Tensor, entry: LoraEntry) -> Pair:
    """Views of A and B; `run` is the adapter's run, wherever it lies."""
    return (
        _piece(run, entry.offset_a, entry.rank, entry.in_features),
        _piece(run, entry.offset_b, entry.out_features, entry.rank),
    )


def _piece(run: Tensor, offset: int, rows: int, columns: int) -> Tensor:
    return run.narrow(0, offset, rows * columns).view(rows, columns)


def _plan(spec: LoraSpec, tensors: tuple[StoredTensor, ...], targets: ModelTargets) -> list[_Planned]:
    """Check everything that the header and the config can tell. In model order."""
    halves: dict[str, dict[Half, StoredTensor]] = {}
    for tensor in tensors:
        name = parse_key(tensor.name)
        pair = halves.setdefault(name.module, {})
        if name.half in pair:
            raise AdapterInvalid(f"tensor {shown(tensor.name)} is there twice, under two spellings")
        pair[name.half] = tensor
    if not halves:
        raise AdapterInvalid(f"{WEIGHTS_FILE} has no tensors")
    by_path = targets.by_path()
    planned = []
    for module, pair in halves.items():
        for half in ("A", "B"):
            if half not in pair:
                missing = shown(format_key(TensorName(module, half)))
                raise AdapterInvalid(f"tensor {missing} is missing; its other half is there")
        target = by_path.get(module)
        if target is None:
            raise AdapterIncompatible(_no_such_module(module, by_path, spec))
        if not spec.matches(module):
            raise AdapterInvalid(
                f"tensor {shown(pair['A'].name)} is for a module that adapter_config.json does not target"
            )
        linear = targets.targets[target]
        rank = _check_shapes(pair["A"], pair["B"], linear, spec)
        planned.append(_Planned(target, linear, pair["A"], pair["B"], spec.scaling(module, rank)))
    planned.sort(key=lambda one: one.target)
    return planned


def _no_such_module(module: str, by_path: Mapping[str, TargetId], spec: LoraSpec) -> str:
    trained_on = "" if spec.base_model is None else f"; it was trained on {shown(spec.base_model)}"
    last = module.rpartition(".")[2]
    if last in ("lm_head", "embed_tokens", "wte", "embed_out", "output"):
        return f"the adapter targets {shown(module)}; embeddings and output heads are not served yet"
    known = sorted({path.rpartition(".")[2] for path in by_path})
    return (
        f"the adapter targets {shown(module)}, which is no linear layer of the served model"
        f" (its layers have: {', '.join(known[:16])}){trained_on}"
    )


def _check_shapes(a: StoredTensor, b: StoredTensor, linear: LinearTarget, spec: LoraSpec) -> int:
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
    for tensor, expected in ((a, (rank, linear.in_features)), (b, (linear.out_features, rank))):
        if tensor.shape != expected:
            raise AdapterIncompatible(
                f"tensor {shown(tensor.name)} has shape {list(tensor.shape)};"
                f" the served model needs {list(expected)}"
            )
    said = spec.rank_of(linear.path)
    if said != rank:
        raise AdapterInvalid(f"tensor {shown(a.name)} has rank {rank}; adapter_config.json says {said}")
    return rank


def _lay_out(planned: list[_Planned], dtype: torch.dtype) -> tuple[dict[TargetId, LoraEntry], int]:
    """Places of all pieces, and the length of the run in bytes."""
    step = ALIGNMENT_BYTES // dtype.itemsize
    entries: dict[TargetId, LoraEntry] = {}
    end = 0
    for one in planned:
        offset_b = end + -(-one.a.num_elements // step) * step
        entries[one.target] = LoraEntry(
            rank=one.a.shape[0],
            in_features=one.linear.in_features,
            out_features=one.linear.out_features,
            offset_a=end,
            offset_b=offset_b,
        )
        end = offset_b + -(-one.b.num_elements // step) * step
    return entries, end * dtype.itemsize


def _fill(
    file: SafetensorsFile, planned: list[_Planned], run: Tensor, entries: Mapping[TargetId, LoraEntry]
) -> Revision:
    """Read all numbers into their places.

    The digest of them, whatever dtype they are served in, and of what each is: whatever changes the
    arithmetic changes the digest, and so may a reordering of the file, which only costs what could be shared.
    """
    whole, origin = hashlib.sha256(), file.tensors[0].start
    pieces = []
    for one in planned:
        a, b = make_pair(run, entries[one.target])
        pieces += [Piece(one.a, a), Piece(one.b, b, one.scaling)]
        path = one.linear.path.encode()
        whole.update(struct.pack("<IIIId", len(path), *one.a.shape, one.linear.out_features, one.scaling))
        whole.update(path)
        for stored in (one.a, one.b):
            whole.update(struct.pack("<4sQ", stored.dtype.encode(), stored.start - origin))
    whole.update(convert(file, pieces))
    return Revision(whole.hexdigest()[: 2 * _DIGEST_BYTES])
