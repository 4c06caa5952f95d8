"""Token ids to text, one token at a time.

The pieces that `push` and `flush` return, joined, are the text of all ids; a character whose bytes are
spread over several tokens comes whole with its last token and never as U+FFFD first. The prompt counts as
context: the first generated word keeps its leading space when something stands before it, and a character
begun in the prompt is finished by the answer.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from server.text.token_bytes import FirstSpace, TokenBytes
from server.text.tokenizer import Tokenizer

_MAX_HELD_TOKENS = (
    8  # a character has at most 4 bytes, so 4 tokens that finish nothing are garbage; twice that
)
_PROMPT_TAIL_TOKENS = 8  # holds the last 4 bytes of the prompt even with special tokens in between
_INCOMPLETE = "\ufffd"


class Detokenizer(Protocol):
    """The text state of one choice."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" for special tokens and inside a character."""
        ...

    def flush(self) -> str:
        """What an unfinished character leaves behind: "" or U+FFFD. Nothing may be pushed after it."""
        ...


def make_detokenizer(tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> Detokenizer:
    if tokenizer.token_bytes is not None:
        return ByteDetokenizer(tokenizer.token_bytes, prompt_ids, tokenizer.special_ids)
    return WindowDetokenizer(tokenizer, prompt_ids)


class ByteDetokenizer:
    """For tokenizers whose tokens are fixed runs of bytes: incremental UTF-8 decoding, exact and O(1) per
    token.
    """

    __slots__ = ("_bytes_of", "_decoder", "_is_first")

    def __init__(self, bytes_of: TokenBytes, prompt_ids: Sequence[int], special_ids: frozenset[int]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in prompt_ids[-_PROMPT_TAIL_TOKENS:]:
            self._decoder.decode(bytes_of[token_id])  # only an unfinished character stays behind
        has_context = any(token_id not in special_ids for token_id in prompt_ids)
        self._is_first = bytes_of.first_space is not FirstSpace.KEPT and not has_context

    def push(self, token_id: int) -> str:
        piece = self._bytes_of[token_id]
        if self._is_first and piece:
            self._is_first = False
            piece = self._bytes_of.start_of_text(piece)
        return self._decoder.decode(piece)

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For every other tokenizer: decode the last piece with and without the new tokens and take the
    difference.

        ids   ... [ context | held ]        text = decode(context + held) minus decode(context)

    `context` is the tokens of the piece before; `held` grows while the text ends inside a character, up to
    a bound, so that a model that babbles broken bytes is neither silent for ever nor quadratic.
    """

    __slots__ = ("_context", "_held", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt_ids[-_PROMPT_TAIL_TOKENS:])
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._text_of_held()
        if len(self._held) < _MAX_HELD_TOKENS and (not text or text.endswith(_INCOMPLETE)):
            return ""
        if text:
            self._context = self._held
        self._held = []
        return text

    def flush(self) -> str:
        text = self._text_of_held()
        self._held = []
        return text

    def _text_of_held(self) -> str:
        before = self._tokenizer.decode(self._context)
        after = self._tokenizer.decode(self._context + self._held)
        return after[len(before) :] if after.startswith(before) else self._tokenizer.decode(self._held)
