"""The words of the adapters package that other layers also speak. Standard library only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType, Protocol

Revision = NewType("Revision", str)
"""Hex digest of an adapter's validated tensors and of what the loader derived from its config."""

_MAX_NAME_CHARS = 256  # of what stands for several adapters in headers and logs

UNREAD = Revision("")
"""Stands in the `AdapterInfo` of an adapter whose weights nobody has needed yet. No lease has it."""

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
        """Several adapters; the scales of one that comes more than once are added, by whatever names."""
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
        """The adapter's own, or all of them with their scales, as in "a:0.5+b:2"; long ones are cut."""
        if self.is_single:
            return self.parts[0].ref.name
        name = "+".join(sorted(f"{part.ref.name}:{part.scale:g}" for part in self.parts))
        return name if len(name) <= _MAX_NAME_CHARS else f"{name[: _MAX_NAME_CHARS - 1]}…"

    @property
    def counted_as(self) -> str:
        """The name that its requests are counted under: an adapter's own, whatever its scale, or all."""
        return self.parts[0].ref.name if len(self.parts) == 1 else self.name

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

    ref: AdapterRef  # its revision may be UNREAD
    root: str  # where it came from, as given by the operator
    source: str  # "local", "hub", "s3" or "upload"
    rank: int  # largest rank over its targets
    targets: tuple[str, ...]  # distinct last parts of the module paths, e.g. ("q_proj", "v_proj")
    num_bytes: int
    created: int  # unix time of registration, seconds
    kinds: tuple[str, ...] = ()  # sorted names out of `adapters.weights`, () for plain LoRA

    @property
    def revision(self) -> Revision | None:
        """None: not known before the weights are read for the first time."""
        return None if self.ref.revision == UNREAD else self.ref.revision


@dataclass(frozen=True, slots=True)
class Outline:
    """What the config and the header of the weights tell of an adapter, without its numbers."""

    rank: int  # largest rank over its targets
    target_names: tuple[str, ...]
    num_bytes: int  # of its run, in the served dtype
    kinds: tuple[str, ...] = ()


class Described(Protocol):
    """What an outline and weights have in common."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def target_names(self) -> tuple[str, ...]: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...


def kind_of(kinds: Iterable[str]) -> str:
    """An adapter's kinds in one word; "lora" where there is nothing beside that."""
    return "+".join(kinds) or "lora"


class Tier(StrEnum):
    """The nearest place where an adapter's weights are."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """What an operator may know about a registered adapter."""

    info: AdapterInfo
    is_loaded: bool  # in host memory
    is_pinned: bool
    users: int  # leases now, of all its revisions
    last_used: float | None  # unix time, seconds
    loads: int  # how often its files were read, checked and converted
    load_seconds: float | None  # of the last load, without the wait for a free loader
    error: str | None = None  # why its files could not be loaded last time; an older revision may be served


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What forgetting a name has freed."""

    name: str
    revision: Revision | None  # None: its weights were never read
    num_bytes: int  # of host memory, now; 0 while others use the weights
    users: int  # leases that still run and keep what they use


class TargetKind(StrEnum):
    """Where in the model a target is, and so which rows it sees."""

    LINEAR = "linear"  # inside the decoder layers: hidden states of all tokens of a step
    EMBEDDING = "embedding"  # the tokens themselves
    HEAD = "head"  # hidden states of the rows whose logits are wanted


@dataclass(frozen=True, slots=True)
class LinearTarget:
    """One linear map of the served model that an adapter may change, y = W x (+ bias).

    The embedding is one too: its x is one-hot, so its inputs are the tokens and its W the table transposed.
    """

    path: str  # module path in the model, e.g. "model.layers.0.self_attn.q_proj"
    in_features: int
    out_features: int
    kind: TargetKind = TargetKind.LINEAR
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class ModelTargets:
    """All of the served model that adapters may change. Index = TargetId.

    The linear layers in module order, then the embedding and the output matrix where the model has them.
    """

    targets: tuple[LinearTarget, ...]
    num_layers: int  # decoder layers of the model
    embed_scale: float = 1.0  # what the embedding multiplies its rows with
    is_tied: bool = False  # the output matrix is the embedding's table

    def by_path(self) -> Mapping[str, TargetId]:
        return {target.path: TargetId(i) for i, target in enumerate(self.targets)}

    @property
    def embedding(self) -> TargetId | None:
        return self._only(TargetKind.EMBEDDING)

    @property
    def head(self) -> TargetId | None:
        return self._only(TargetKind.HEAD)

    def _only(self, kind: TargetKind) -> TargetId | None:
        return next((TargetId(i) for i, target in enumerate(self.targets) if target.kind is kind), None)


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """Where what an adapter has for one target lies in its run, counted in elements.

    run  [ ... | A, rank x in_features | B, out_features x rank | gain | bias | ... ]   both out_features
               offset_a                offset_b                 offset_gain, offset_bias

    Of an embedding A is transposed, in_features x rank, so that a token's numbers are adjacent.
    """

    rank: int
    in_features: int
    out_features: int
    offset_a: int
    offset_b: int
    scaling: float = 1.0  # alpha / r or the like, which is in B: whoever merges needs B without it
    offset_gain: int | None = None  # only DoRA has one
    offset_bias: int | None = None  # lora_bias, and DoRA on a layer with a bias
    kind: TargetKind = TargetKind.LINEAR


@dataclass(frozen=True, slots=True)
class TokenRowsEntry:
    """Where the rows lie that replace those of some tokens, counted in elements of the run.

    run  [ ... | ids, int64 x num_rows, ascending | rows, num_rows x width | ... ]
               offset_ids                           offset_rows
    """

    num_rows: int
    width: int
    offset_ids: int
    offset_rows: int
    kind: TargetKind  # EMBEDDING or HEAD


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
