"""Text to token ids and back, on the model's own fast tokenizer.

`Tokenizer` calls the `tokenizers` object behind the transformers class directly: that one has no state that
a call changes (truncation and padding are switched off once), so the pool's threads and the event loop may
share it. Decoding never "cleans up" spaces, so that a streamed text and a whole one are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from server.errors import BadRequest, TemplateFailed
from server.text.chat_template import ChatTemplate
from server.text.token_bytes import TokenBytes, decoder_json, spelling_of

_NUM_CHECKED_TOKENS = 512  # how many tokens are decoded at load to verify the byte spelling


class UnsupportedTokenizer(ValueError):
    """The model's tokenizer has no fast version; the message says so."""


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One token of an encoded text: text[start:stop], in characters. Special tokens that were added are
    empty.
    """

    id: int
    text: str
    start: int
    stop: int


class Tokenizer:
    """One per process. All methods are thread-safe."""

    def __init__(self, backend: Any, chat_template: ChatTemplate | None = None) -> None:
        """`backend` is a `tokenizers.Tokenizer`, owned from here on: its truncation and padding are
        switched off.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self._special: dict[int, str] = {
            id: token.content for id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self.special_ids: frozenset[int] = frozenset(self._special)
        vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocab.values(), default=-1)
        self.max_token_chars: int = max(map(len, vocab), default=1)
        """No text of more than this times n characters fits in n tokens (byte-level tokens count their
        bytes).
        """
        self.token_bytes: TokenBytes | None = self._find_token_bytes()
        """None: tokens of this tokenizer are not fixed runs of bytes."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the tokenizer of a local checkpoint. No network, no code from the checkpoint.

        Raises UnsupportedTokenizer without a fast tokenizer, OSError or ValueError if the files are missing
        or broken.
        """
        from transformers import AutoTokenizer  # here: the policy layers import without transformers

        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedTokenizer(
                f"{type(tokenizer).__name__} has no fast version: no tokenizer.json can be made of it"
            )
        template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        return cls(backend, template)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template."""
        return None if self._chat_template is None else self._chat_template.source

    def render_chat(
        self,
        messages: Sequence[dict[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: object,
    ) -> str:
        """The prompt text for a conversation, special tokens written out.

        Encode it with `add_special_tokens=False`: a template that wants a beginning-of-sequence token
        writes it. Raises BadRequest (param "messages") with the template's own message, or when there is no
        template.
        """
        if self._chat_template is None:
            raise TemplateFailed(
                "this model has no chat template; send a prompt to the completions route instead",
                param="messages",
            )
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises BadRequest if the text holds lone surrogates, which no encoding of text can express."""
        ids: list[int] = self._encode(text, add_special_tokens).ids
        return ids

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> list[TokenSpan]:
        encoding = self._encode(text, add_special_tokens)
        return [
            TokenSpan(id, text[start:stop], start, stop)
            for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids without a token are left out."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """A token by itself: special tokens spelled out, leading spaces kept, U+FFFD for pieces of a
        character.
        """
        special = self._special.get(token_id)
        if special is not None:
            return special
        if self.token_bytes is not None:
            return self.token_bytes[token_id].decode(errors="replace")
        return self.decode([token_id])

    def special_text(self, token_id: int) -> str | None:
        """The spelling of a special token; None for all others."""
        return self._special.get(token_id)

    def spell_token(self, token_id: int) -> bytes:
        """A token's own bytes, exact also for pieces of a character where the tokenizer works on bytes."""
        if self.token_bytes is not None and token_id not in self.special_ids:
            return self.token_bytes[token_id]
        return self.token_text(token_id).encode()

    def _encode(self, text: str, add_special_tokens: bool) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("the text is not valid Unicode: it holds a lone surrogate") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def _find_token_bytes(self) -> TokenBytes | None:
        spelling = spelling_of(decoder_json(self._backend.decoder))
        if spelling is None:
            return None
        token_bytes = TokenBytes(spelling, self._backend.id_to_token, self.special_ids)
        return token_bytes if self._spells_like_the_decoder(token_bytes) else None

    def _spells_like_the_decoder(self, token_bytes: TokenBytes) -> bool:
        """Compare a spread of whole-character tokens with the decoder itself: two opinions are better than
        one.
        """
        stride = max(1, self.vocab_size // _NUM_CHECKED_TOKENS)
        for token_id in range(0, self.vocab_size, stride):
            piece = token_bytes[token_id]
            expected = self.decode([token_id, token_id])
            if "\ufffd" in expected:  # a piece of a character: decoders differ in how they show it
                continue
            if (token_bytes.start_of_text(piece) + piece).decode(errors="replace") != expected:
                return False
        return True
