"""Tokens beside the vocabulary, and what stands around a text: all in which an adapter's tokenizer may differ
from the base model's.
"""

from dataclasses import dataclass
from typing import Any, Self

MAX_ADDED_TOKENS = 16384
MAX_ADDED_CHARS = 64
"""Of one token that an adapter adds. `max_token_chars` is never less, so that a prompt can be checked before
it is known whose tokens it has."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the vocabulary: it is found in a text before anything else is."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    @classmethod
    def parse(cls, value: object, *, special: bool = False) -> Self | None:
        """As files have it: a text, or an object with these fields. None for what is neither; `special` is
        for where they do not say.
        """
        entry = value if isinstance(value, dict) else {"content": value}
        content, is_special = entry.get("content"), entry.get("special", special)
        flags: dict[str, Any] = {name: entry.get(name, False) for name in ("single_word", "lstrip", "rstrip")}
        flags |= {"special": is_special, "normalized": entry.get("normalized", not is_special)}
        if not isinstance(content, str) or not content or not all(type(f) is bool for f in flags.values()):
            return None
        return cls(content, **flags)


@dataclass(frozen=True, slots=True)
class Frame:
    """The ids that are put before and after a text when special tokens are asked for."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
