"""Numbers out of a file into their places in the run, and the digest of what they mean.

The digest is made of the stored numbers and of all that the config adds to them, whatever dtype they are
served in. It knows nothing of the base model: a server has one. What only has to be scaled goes the fast way
(conversion.py), all together at the end; what is more than plain LoRA is read tensor by tensor.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapters.base import BaseWeights
from adapters.conversion import DTYPES, Piece, check_values, convert
from adapters.dora import factors
from adapters.errors import AdapterIncompatible
from adapters.inventory import StoredBase, StoredTerms
from adapters.names import shown
from adapters.run import RunLayout, make_terms, make_token_rows
from adapters.safetensors_file import SafetensorsFile, StoredTensor
from adapters.trained_tokens import StoredRows
from adapters.types import Revision, TargetKind, TokenRowsEntry

_DIGEST_BYTES = 16
_COMPARED_BYTES = 1 << 22  # of a whole embedding at once


class Filler:
    """Fills one run. Raises AdapterInvalid, naming the tensor, for numbers that cannot be served."""

    def __init__(
        self, file: SafetensorsFile, run: Tensor, layout: RunLayout, base: BaseWeights | None
    ) -> None:
        self._run = run
        self._file = file
        self._layout = layout
        self._base = base
        self._digest = hashlib.sha256()
        self._pieces: list[Piece] = []  # whose numbers are read at the end

    def finish(self) -> Revision:
        """Read what has not been read; the digest of all.

        The numbers come in the order of the file, and the order is a part of the digest. So the same tensors
        in another order are another revision, which only costs what could be shared.
        """
        if self._pieces:
            starts = [piece.stored.start for piece in self._pieces]
            place_in_file = {start: number for number, start in enumerate(sorted(starts))}
            order = (place_in_file[start] for start in starts)
            self._digest.update(struct.pack(f"<{len(starts)}I", *order))
            self._digest.update(convert(self._file, self._pieces))
        return Revision(self._digest.hexdigest()[: 2 * _DIGEST_BYTES])

    def fill_terms(self, one: StoredTerms, embed_scale: float) -> None:
        """A, B, gain and bias of one target."""
        linear, path = one.linear, one.linear.path.encode()
        self._digest.update(
            struct.pack("<IIIId", len(path), one.rank, linear.in_features, linear.out_features, one.scaling)
        )
        self._digest.update(path)
        terms = make_terms(self._run, self._layout.entries[one.target])
        if linear.kind is TargetKind.LINEAR and one.magnitude is None and not one.is_transposed:
            self._fill_later(one.a, terms.a, 1.0)
            self._fill_later(one.b, terms.b, one.scaling)
            if one.bias is not None:
                assert terms.bias is not None
                self._mark("bias")
                self._fill_later(one.bias, terms.bias, one.scaling)
            return
        a, b = self._read(one.a), self._read(one.b)
        if one.is_transposed:
            a, b = a.t(), b.t()
        factor: Tensor | float = one.scaling * (embed_scale if linear.kind is TargetKind.EMBEDDING else 1.0)
        if one.magnitude is not None:
            assert self._base is not None
            assert terms.gain is not None
            check_values(a, one.a)
            check_values(b, one.b)
            magnitude = self._read(one.magnitude, "magnitude")
            gained = factors(self._base, one.target, a, b, one.scaling, magnitude)
            _put(terms.gain, gained - 1.0, one.magnitude)
            if terms.bias is not None:
                bias = self._base.bias(one.target)
                assert bias is not None, "the target says that it has one"
                _put(terms.bias, (1.0 - gained) * bias, one.magnitude)
            factor = (gained * factor).float()[:, None]
        elif one.bias is not None:
            assert terms.bias is not None
            _put(terms.bias, self._read(one.bias, "bias") * one.scaling, one.bias)
        _put(terms.a, a, one.a)
        _put(terms.b, b if isinstance(factor, float) and factor == 1.0 else b.mul_(factor), one.b)

    def fill_token_rows(self, one: StoredRows, entry: TokenRowsEntry, embed_scale: float) -> None:
        """Ids in ascending order, and their rows; an embedding's as it would give them out."""
        self.count(f"token rows of {one.linear.path}", one.ids)
        ids = torch.tensor(one.ids, dtype=torch.int64)
        order = ids.argsort()
        trained = make_token_rows(self._run, entry)
        rows = self._read(one.rows, "rows").index_select(0, order)
        trained.ids.copy_(ids[order])
        _put(trained.rows, rows * (embed_scale if entry.kind is TargetKind.EMBEDDING else 1.0), one.rows)

    def count(self, what: str, ids: Sequence[int]) -> None:
        """Make tokens a part of the digest."""
        if ids:
            self._mark(what)
            self._digest.update(struct.pack(f"<I{len(ids)}I", len(ids), *ids))

    def _fill_later(self, stored: StoredTensor, place: Tensor, scaling: float) -> None:
        self._digest.update(struct.pack("<4s", stored.dtype.encode()))
        self._pieces.append(Piece(stored, place, scaling))

    def _mark(self, what: str) -> None:
        """What follows is something else than the next target: no path is so long."""
        name = what.encode()
        self._digest.update(struct.pack("<II", 0xFFFFFFFF, len(name)) + name)

    def _read(self, stored: StoredTensor, what: str | None = None) -> Tensor:
        values = _as_tensor(self._file, stored).to(torch.float32)
        if what is not None:
            self._mark(what)
        self._digest.update(values.view(-1).numpy().data)
        return values


def check_bases(file: SafetensorsFile, bases: Sequence[StoredBase], base: BaseWeights | None) -> None:
    """Whole embeddings that were saved along must be those that are served, up to the rounding of a cast.

    Raises AdapterIncompatible, naming the tensor.
    """
    for one in bases:
        width = one.weight.shape[1]
        item_bytes = (one.weight.stop - one.weight.start) // max(one.weight.num_elements, 1)
        num_rows = max(1, _COMPARED_BYTES // max(width * item_bytes, 1))
        start = one.weight.start
        for ours in () if base is None else base.token_rows(one.target, num_rows):
            stop = start + ours.numel() * item_bytes
            part = replace(one.weight, shape=tuple(ours.shape), start=start, stop=stop)
            theirs = _as_tensor(file, part)
            if not (torch.equal(theirs.to(ours.dtype), ours) or torch.equal(ours.to(theirs.dtype), theirs)):
                raise AdapterIncompatible(
                    f"tensor {shown(one.weight.name)} is not the served model's own weight; adapters that"
                    " bring an embedding or an output matrix of their own (as after new tokens were added, or"
                    " with modules_to_save) are not served"
                )
            start = stop


def _as_tensor(file: SafetensorsFile, stored: StoredTensor) -> Tensor:
    content = file.read(stored)
    if not content:
        return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    return torch.frombuffer(content, dtype=DTYPES[stored.dtype]).view(stored.shape)


def _put(place: Tensor, values: Tensor, stored: StoredTensor) -> None:
    place.copy_(values)
    check_values(place, stored)
