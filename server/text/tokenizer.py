"""Text to token ids and back, on the model's own fast tokenizer.

`Tokenizer` calls the `tokenizers` object behind the transformers class directly: that one has no state that
a call changes (truncation and padding are switched off once), so the pool's threads and the event loop may
share it. Decoding never "cleans up" spaces, so that a streamed text and a whole one are the same.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from server.errors import BadRequest, TemplateFailed
from server.text.added_tokens import MAX_ADDED_CHARS, AddedToken, Frame
from server.text.chat_template import ChatTemplate
from server.text.token_bytes import OverlaidTokenBytes, TokenBytes, decoder_json, spelling_of

SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
"""What a tokenizer does to a text beside looking for its pieces, as its file calls it."""

_NUM_CHECKED_TOKENS = 512  # how many tokens are decoded at load to verify the byte spelling
_MODEL_OPTIONS = (
    *("dropout", "unk_token", "unk_id", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"),
    *("byte_fallback", "ignore_merges", "max_input_chars_per_word"),
)


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


class Template(Protocol):
    """A chat template, wherever it runs."""

    @property
    def source(self) -> str: ...

    def render(
        self,
        messages: Sequence[dict[str, object]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        **variables: object,
    ) -> str:
        """Raises TemplateFailed or BadRequest, param "messages"."""
        ...


class Tokenizer:
    """The base model's, and one for each text that adapters bring along. All methods are thread-safe."""

    def __init__(
        self,
        backend: Any,
        chat_template: Template | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`backend` is a `tokenizers.Tokenizer`, owned from here on: its truncation and padding are
        switched off. `named_tokens`: what a template may call by a name, as in "eos_token".
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self.named_tokens: Mapping[str, str] = dict(named_tokens or {})
        self.eos_token_ids: frozenset[int] = frozenset()
        """End an answer, beside those that the model itself names."""
        self.chat_pool: Executor | None = None
        """Where chats have to be rendered, because that waits for another process; None: anywhere."""
        vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocab.values(), default=-1)
        self.max_token_chars: int = max(MAX_ADDED_CHARS, *map(len, vocab))
        """No text of more than this times n characters fits in n tokens (byte-level tokens count their
        bytes).
        """
        self._take_added_tokens()
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
        return cls(backend, template, tokenizer.special_tokens_map)

    def with_tokens(self, added: Iterable[AddedToken]) -> Self:
        """The same vocabulary with these added tokens instead of its own, in this order. Costs little: the
        vocabulary itself is shared.

        A token that the vocabulary has keeps its id, any other gets the next one.
        """
        from tokenizers import AddedToken as Token
        from tokenizers import Tokenizer as Backend

        backend = Backend(self._backend.model)
        for section in SECTIONS:
            setattr(backend, section, getattr(self._backend, section))
        backend.encode_special_tokens = self._backend.encode_special_tokens
        backend.add_tokens([_to_token(Token, token) for token in added])
        other = copy.copy(self)
        other._backend = backend
        other._take_added_tokens()
        other.vocab_size = max(self.vocab_size, *(token_id + 1 for token_id in other.added_tokens))
        other._overlay_token_bytes(self)
        return other

    def with_frame(self, frame: Frame) -> Self:
        """The same, putting other ids around a text."""
        other = self.with_tokens(self.added_tokens.values())
        other._backend.post_processor = _framing(frame, self.token_of)
        return other

    def with_ends(self, eos_token_ids: frozenset[int]) -> Self:
        """The same with these ends of an answer."""
        other = copy.copy(self)
        other.eos_token_ids = eos_token_ids
        return other

    def with_template(self, template: Template, chat_pool: Executor) -> Self:
        """The same with a chat template that has to be rendered in the pool."""
        other = copy.copy(self)
        other._chat_template = template
        other.chat_pool = chat_pool
        return other

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

    def id_of(self, token: str) -> int | None:
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def token_of(self, token_id: int) -> str | None:
        """As the vocabulary spells it."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    @property
    def frame(self) -> Frame:
        """What it puts around a text that is not empty."""
        alone = self.encode("a", add_special_tokens=False)
        framed = self.encode("a")
        starts = range(len(framed) - len(alone) + 1)
        start = next((i for i in starts if framed[i : i + len(alone)] == alone), 0)
        return Frame(tuple(framed[:start]), tuple(framed[start + len(alone) :]))

    @property
    def sections(self) -> dict[str, object]:
        """The parts of its pipeline, each as its own JSON."""
        states = {name: getattr(self._backend, name) for name in SECTIONS}
        return {
            name: None if part is None else json.loads(part.__getstate__()) for name, part in states.items()
        }

    @property
    def model_options(self) -> dict[str, object]:
        """How its vocabulary is applied."""
        model = self._backend.model
        return {name: getattr(model, name) for name in _MODEL_OPTIONS if hasattr(model, name)}

    def to_json(self) -> bytes:
        """The whole as a file. Holds the interpreter all the while: not for when others are served."""
        text: str = self._backend.to_str()
        return text.encode()

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

    def _take_added_tokens(self) -> None:
        tokens = self._backend.get_added_tokens_decoder()
        self.added_tokens: Mapping[int, AddedToken] = {
            token_id: AddedToken(
                token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special
            )
            for token_id, token in sorted(tokens.items())
        }
        self._special: dict[int, str] = {
            token_id: token.content for token_id, token in self.added_tokens.items() if token.special
        }
        self.special_ids: frozenset[int] = frozenset(self._special)

    def _overlay_token_bytes(self, base: "Tokenizer") -> None:
        """Spell what differs anew, and the rest as the base does, whose spellings are there already."""
        if base.token_bytes is None:
            return
        own, known = self.added_tokens, base.added_tokens
        changed = {i for i in own.keys() | known.keys() if own.get(i) != known.get(i)}
        spelled = base.token_bytes.spell_anew(changed, self._backend.id_to_token, self.special_ids)
        self.token_bytes = OverlaidTokenBytes(base.token_bytes, spelled)

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


def _to_token(make: Any, token: AddedToken) -> Any:
    return make(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _framing(frame: Frame, token_of: Any) -> Any:
    """A post-processor that does nothing but put these ids around a text."""
    from tokenizers.processors import TemplateProcessing

    tokens = [
        {"id": f"token {i}", "ids": [i], "tokens": [token_of(i)]}
        for i in dict.fromkeys(frame.before + frame.after)
    ]
    pieces = [*(f"token {i}" for i in frame.before), "$A", *(f"token {i}" for i in frame.after)]
    return TemplateProcessing(single=pieces, special_tokens=tokens)
