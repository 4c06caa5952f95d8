"""What a request says about its adapters beside the name of its model. Standard library only.

Protocols make these of their bodies, and the service turns them into leases. A wish for a set or for a merge
stands in place of the model's name.
"""

from dataclasses import dataclass

from adapters.recipes import MergeRecipe


class Secret:
    """A client's token for a place that adapters come from: never printed, and forgotten when it was used."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text: str | None = text

    def reveal(self) -> str | None:
        """None: it was used."""
        return self._text

    def forget(self) -> None:
        self._text = None

    def __repr__(self) -> str:
        return "Secret()"


@dataclass(frozen=True, slots=True)
class PartWish:
    """One adapter of a weighted set, which is applied as it is, summed with the others."""

    name: str
    scale: float
    param: str  # where the client says the name


@dataclass(frozen=True, slots=True)
class MergeWish:
    """Adapters whose weights are merged into one."""

    names: tuple[str, ...]  # at least one
    recipe: MergeRecipe
    param: str = "merged_adapters"


@dataclass(frozen=True, slots=True)
class AdapterWish:
    """Where adapters come from, with what right, and which, unless the model's name says it."""

    source: str | None = None  # None: wherever this server usually looks
    token: Secret | None = None
    parts: tuple[PartWish, ...] | None = None
    merge: MergeWish | None = None

    def names_for(self, model: str | None) -> tuple[str, ...]:
        """The adapters that are asked for, where `model` is what the client calls its model."""
        if self.parts is not None:
            return tuple(part.name for part in self.parts)
        if self.merge is not None:
            return self.merge.names
        return () if model is None else (model,)

    def forget_token(self) -> None:
        """It has been used, or will not be."""
        if self.token is not None:
            self.token.forget()


NO_WISH = AdapterWish()
