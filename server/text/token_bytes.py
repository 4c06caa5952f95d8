"""What bytes a token stands for.

Decoders that work token by token and then join bytes (byte-level BPE; SentencePiece with metaspaces and
byte fallback) make every token a fixed run of bytes, whatever stands beside it. Knowing those bytes turns
streaming into plain incremental UTF-8 decoding: exact, O(1) per token, and immune to long runs of broken
characters. One thing depends on the place: SentencePiece drops the space in front of the very first word,
which `first_space` says.

Decoders that are not of this kind (WordPiece, "</w>" suffixes, anything unknown) have no TokenBytes; the
detokenizer then compares decoded windows instead.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

Spell = Callable[[str], bytes]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


class FirstSpace(Enum):
    """What happens to spaces at the start of a text."""

    KEPT = auto()
    ONE_DROPPED = auto()  # one leading space of the text
    TOKEN_DROPPED = auto()  # all spaces of the first token


@dataclass(frozen=True, slots=True)
class ByteSpelling:
    """How a decoder's tokens become bytes."""

    spell: Spell
    first_space: FirstSpace


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (from GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet.values())
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def spelling_of(decoder: Mapping[str, Any] | None) -> ByteSpelling | None:
    """The spelling for a decoder's own JSON, or None when its tokens are not fixed runs of bytes."""
    if decoder is None:
        return None
    steps: Sequence[Mapping[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteSpelling(_byte_level_spell(), FirstSpace.KEPT)
    if kinds in (["Metaspace"], ["ByteFallback", "Metaspace"]) and steps[-1]["replacement"] == _METASPACE:
        dropped = steps[-1]["prepend_scheme"] != "never"
        first_space = FirstSpace.TOKEN_DROPPED if dropped else FirstSpace.KEPT
        return ByteSpelling(_metaspace_spell("ByteFallback" in kinds), first_space)
    return _sentencepiece_spelling(steps, kinds)


def _sentencepiece_spelling(steps: Sequence[Mapping[str, Any]], kinds: list[str]) -> ByteSpelling | None:
    """Replace, ByteFallback, Fuse, perhaps Strip: SentencePiece as Llama, Mistral, Gemma, Phi have it."""
    strips = kinds[-1:] == ["Strip"]
    if (kinds[:-1] if strips else kinds) not in (["Replace", "ByteFallback", "Fuse"], ["Replace", "Fuse"]):
        return None
    if steps[0]["pattern"] != {"String": _METASPACE} or steps[0]["content"] != " ":
        return None
    if strips and (steps[-1]["content"], steps[-1]["start"], steps[-1]["stop"]) != (" ", 1, 0):
        return None
    first_space = FirstSpace.ONE_DROPPED if strips else FirstSpace.KEPT
    return ByteSpelling(_metaspace_spell("ByteFallback" in kinds), first_space)


def _byte_level_spell() -> Spell:
    alphabet = byte_alphabet()

    def spell(token: str) -> bytes:
        try:
            return bytes([alphabet[character] for character in token])
        except KeyError:  # an added token outside the alphabet stands for itself
            return token.encode()

    return spell


def _metaspace_spell(has_byte_tokens: bool) -> Spell:
    def spell(token: str) -> bytes:
        if has_byte_tokens and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace(_METASPACE, " ").encode()

    return spell


class TokenBytes:
    """Token id to bytes, spelled on first use and kept: at most one entry per vocabulary entry."""

    __slots__ = ("_kept", "_special_ids", "_spell", "_token_of", "first_space")

    def __init__(
        self,
        spelling: ByteSpelling,
        token_of: Callable[[int], str | None],
        special_ids: frozenset[int],
    ) -> None:
        self.first_space = spelling.first_space
        self._spell = spelling.spell
        self._token_of = token_of
        self._special_ids = special_ids
        self._kept: dict[int, bytes] = {}

    def start_of_text(self, piece: bytes) -> bytes:
        """What is left of a piece when nothing stands before it."""
        if self.first_space is FirstSpace.ONE_DROPPED:
            return piece.removeprefix(b" ")
        return piece.replace(b" ", b"") if self.first_space is FirstSpace.TOKEN_DROPPED else piece

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes a token adds to the text: none for special tokens and for ids without a token."""
        spelled = self._kept.get(token_id)
        if spelled is None:
            token = None if token_id in self._special_ids else self._token_of(token_id)
            spelled = self._kept[token_id] = b"" if token is None else self._spell(token)
        return spelled

    def spell_anew(
        self, ids: Iterable[int], token_of: Callable[[int], str | None], special_ids: frozenset[int]
    ) -> dict[int, bytes]:
        """What these ids stand for in a vocabulary that differs from this one in them."""
        other = TokenBytes(ByteSpelling(self._spell, self.first_space), token_of, special_ids)
        return {token_id: other[token_id] for token_id in ids}


class OverlaidTokenBytes(TokenBytes):
    """As its base, but for a few ids. What the base has spelled is kept once for all."""

    __slots__ = ("_base", "_own")

    def __init__(self, base: TokenBytes, own: Mapping[int, bytes]) -> None:
        super().__init__(ByteSpelling(base._spell, base.first_space), base._token_of, base._special_ids)
        self._base = base
        self._own = own

    def __getitem__(self, token_id: int) -> bytes:
        own = self._own.get(token_id)
        return self._base[token_id] if own is None else own


def decoder_json(decoder: Any) -> Mapping[str, Any] | None:
    """The `tokenizers` decoder as its own JSON (its pickle state), without the vocabulary beside it."""
    if decoder is None:
        return None
    state: Mapping[str, Any] = json.loads(decoder.__getstate__())
    return state
