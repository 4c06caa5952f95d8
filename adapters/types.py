"""The words of the adapters package that other layers also speak. Standard library only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NewType, Protocol

Revision = NewType("Revision", str)
"""Hex digest of an adapter's validated tensors and of what the loader derived from its config."""

TargetId = NewType("TargetId", int)
"""Index of a target module in `ModelTargets.targets`."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Identity of an adapter: a request resolves its name once and holds this to its end.

    Two names with one revision share weights and KV; one name with a new revision is a new adapter.
    """

    name: str
    revision: Revision


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """One adapter of a use, and how much of it."""

    ref: AdapterRef
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """What a sequence uses: one adapter, or several at once, summed and unmerged."""

    parts: tuple[AdapterPart, ...]  # at least one, sorted by revision, each revision once

    @classmethod
    def of(cls, ref: AdapterRef) -> "AdapterUse":
        """One adapter as it is."""
        return cls((AdapterPart(ref),))

    @classmethod
    def sum_of(cls, parts: Iterable[AdapterPart]) -> "AdapterUse":
        """Several adapters; the scales of one that comes more than once are added."""
        scales: dict[Revision, AdapterPart] = {}
        for part in parts:
            known = scales.get(part.ref.revision)
            scale = part.scale + (0.0 if known is None else known.scale)
            scales[part.ref.revision] = AdapterPart(part.ref if known is None else known.ref, scale)
        return cls(tuple(scales[revision] for revision in sorted(scales)))

    @property
    def refs(self) -> tuple[AdapterRef, ...]:
        return tuple(part.ref for part in self.parts)

    @property
    def name(self) -> str:
        """The adapter's own, or all of them with their scales, as in "a:0.5+b:2"."""
        if self.is_single:
            return self.parts[0].ref.name
        return "+".join(f"{part.ref.name}:{part.scale:g}" for part in self.parts)

    @property
    def is_single(self) -> bool:
        """Whether it is one adapter as it is."""
        return len(self.parts) == 1 and self.parts[0].scale == 1.0

    @property
    def key(self) -> bytes:
        """What keys and values depend on: equal for uses that compute the same."""
        if self.is_single:
            return self.parts[0].ref.revision.encode()
        return b"+".join(f"{part.ref.revision}*{part.scale!r}".encode() for part in self.parts)


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What a client may know about a registered adapter."""

    ref: AdapterRef
    root: str  # where it came from, as given by the operator
    source: str  # "local"
    rank: int  # largest rank over its targets
    targets: tuple[str, ...]  # distinct last parts of the module paths, e.g. ("q_proj", "v_proj")
    num_bytes: int
    created: int  # unix time of registration, seconds


@dataclass(frozen=True, slots=True)
class LinearTarget:
    """One linear layer of the served model that an adapter may change."""

    path: str  # module path in the model, e.g. "model.layers.0.self_attn.q_proj"
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class ModelTargets:
    """All linear layers of the served model that adapters may change, in module order. Index = TargetId."""

    targets: tuple[LinearTarget, ...]
    num_layers: int  # decoder layers of the model

    def by_path(self) -> Mapping[str, TargetId]:
        return {target.path: TargetId(i) for i, target in enumerate(self.targets)}


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """Where one target's halves lie in an adapter's run, counted in elements.

    run  [ ... | A, rank x in_features | ... | B, out_features x rank | ... ]
               offset_a                      offset_b
    """

    rank: int
    in_features: int
    out_features: int
    offset_a: int
    offset_b: int


@dataclass(frozen=True, slots=True)
class AdapterWrite:
    """Make this adapter resident before the step that carries the write: its run starts at `offset` bytes.

    `moved_from` is its offset before a compaction, or None when its weights come from the host copy.
    """

    ref: AdapterRef
    offset: int
    num_bytes: int
    moved_from: int | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """Answer of a placement that succeeded: what the device has to do, in this order."""

    evicted: tuple[AdapterRef, ...]
    writes: tuple[AdapterWrite, ...]


class Clock(Protocol):
    """Monotonic seconds; injected so that simulations own the time."""

    def __call__(self) -> float: ...
