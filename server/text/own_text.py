"""What an adapter's files say about text that the base's do not, and whether that can be served.

What is served is the base's vocabulary with other added tokens: an id has one row in the model's table of
embeddings, whatever the adapter calls it, so a row may get a name or another one. Where a token that both
tokenizers know has two ids, the adapter was trained on another model, or on one whose rows were moved: keys
and values would still be right, being cached by ids, but the answers would be noise. That is refused, as is
an id beyond the table. A padding token beyond it is left out: it stands beside sequences in training, and
never in one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.errors import AdapterIncompatible, AdapterInvalid
from adapters.names import shown
from server.text.adapter_files import TOKENIZER_FILE, TextFiles
from server.text.added_tokens import MAX_ADDED_CHARS, MAX_ADDED_TOKENS, AddedToken, Frame
from server.text.tokenizer import Tokenizer

_MAX_FRAME = 16


@dataclass(frozen=True, slots=True)
class BaseText:
    """What an adapter's text is compared with."""

    tokenizer: Tokenizer
    frame: Frame
    num_embeddings: int  # rows of the model's table
    eos_token_ids: frozenset[int]  # end the base's answers


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a tokenizer.json was found to say."""

    problem: str | None = None  # why it cannot be used
    added: tuple[tuple[int, AddedToken], ...] = ()  # by rising id
    frame: Frame | None = None  # None: the base's


@dataclass(frozen=True, slots=True)
class OwnText:
    """Empty where the adapter's files say what the base's say."""

    tokens: tuple[AddedToken, ...] | None = None  # all added ones, in order; None: the base's
    frame: Frame | None = None  # None: the base's
    template: str | None = None  # None: the base's
    names: Mapping[str, str] = field(default_factory=dict)  # that an own template can see
    eos_token_ids: frozenset[int] = frozenset()  # beside the base's

    @property
    def key(self) -> str:
        """Equal for texts that are equal."""
        names, ends = sorted(self.names.items()), sorted(self.eos_token_ids)
        return repr((self.tokens, self.frame, self.template, names, ends))


def find_own_text(files: TextFiles, verdict: Verdict, base: BaseText) -> tuple[OwnText, Tokenizer]:
    """And the base's tokenizer with the tokens of the text. Raises AdapterInvalid or AdapterIncompatible,
    naming the token.
    """
    tokens, left_out = _tokens(files, verdict, base), None
    tokenizer = _with_tokens(base, tokens)
    if _is_padding_beyond(tokenizer, files, base):
        left_out = files.named["pad_token"]
        tokens = tuple(token for token in tokens if token != left_out)
        tokenizer = _with_tokens(base, tokens)
    _check_ids(tokenizer, files, verdict, base, left_out)
    template, names = _template(files, base.tokenizer)
    own = OwnText(
        tokens=None if tokenizer is base.tokenizer else tokens,
        frame=_frame(tokenizer, verdict, base),
        template=template,
        names=names,
        eos_token_ids=_ends(tokenizer, files, base),
    )
    return own, tokenizer


def _tokens(files: TextFiles, verdict: Verdict, base: BaseText) -> tuple[AddedToken, ...]:
    """All added tokens, in the order in which transformers adds them."""
    found = {token.content: token for _, token in verdict.added}
    named = (token for token in files.named.values() if token is not None)
    for token in (*(token for _, token in files.added.values()), *named, *files.special):
        found.setdefault(token.content, token)
    if len(found) > MAX_ADDED_TOKENS:
        raise AdapterInvalid(f"the adapter's tokenizer has more than {MAX_ADDED_TOKENS} added tokens")
    new = set(found.values()).difference(base.tokenizer.added_tokens.values())
    if long := next((token.content for token in new if len(token.content) > MAX_ADDED_CHARS), None):
        raise AdapterInvalid(f"token {shown(long)} of the adapter has more than {MAX_ADDED_CHARS} characters")
    return tuple(found.values())


def _with_tokens(base: BaseText, tokens: tuple[AddedToken, ...]) -> Tokenizer:
    is_same = tokens == tuple(base.tokenizer.added_tokens.values())
    return base.tokenizer if is_same else base.tokenizer.with_tokens(tokens)


def _is_padding_beyond(tokenizer: Tokenizer, files: TextFiles, base: BaseText) -> bool:
    """Whether the model has no row for the padding token, and nothing but padding needs it."""
    padding = files.named.get("pad_token")
    if padding is None or padding in (files.named.get("bos_token"), files.named.get("eos_token")):
        return False
    token_id = tokenizer.id_of(padding.content)
    assert token_id is not None, "every named token was added"
    return token_id >= base.num_embeddings and base.tokenizer.id_of(padding.content) is None


def _check_ids(
    tokenizer: Tokenizer,
    files: TextFiles,
    verdict: Verdict,
    base: BaseText,
    left_out: AddedToken | None,
) -> None:
    """Whether each token has the id that the files give it, and the model a row for it."""
    for token_id, token in (*verdict.added, *files.added.values()):
        content, known = token.content, base.tokenizer.id_of(token.content)
        if known not in (None, token_id):
            raise AdapterIncompatible(
                f"token {shown(content)} has the id {token_id} in the adapter's tokenizer, and {known} in "
                f"the served model's: the adapter was not trained on this model"
            )
        is_left_out = left_out is not None and content == left_out.content
        if not is_left_out and tokenizer.id_of(content) != token_id:
            raise AdapterIncompatible(
                f"token {shown(content)} of the adapter cannot have the id {token_id}: after the served "
                f"model's tokens it would be {tokenizer.id_of(content)}"
            )
    for token_id, token in tokenizer.added_tokens.items():
        if token_id >= base.num_embeddings and base.tokenizer.id_of(token.content) is None:
            raise AdapterIncompatible(
                f"token {shown(token.content)} of the adapter has the id {token_id}; the served model has "
                f"embeddings for {base.num_embeddings} tokens"
            )


def _frame(tokenizer: Tokenizer, verdict: Verdict, base: BaseText) -> Frame | None:
    frame = verdict.frame
    if frame is None or frame == base.frame:
        return None
    ids = (*frame.before, *frame.after)
    are_tokens = all(0 <= one < base.num_embeddings and tokenizer.token_of(one) is not None for one in ids)
    if len(ids) > _MAX_FRAME or not are_tokens:
        raise AdapterInvalid(f"{TOKENIZER_FILE} puts tokens around a text that cannot be served")
    return frame


def _template(files: TextFiles, base: Tokenizer) -> tuple[str | None, dict[str, str]]:
    """The template and the names that it sees, if either differs from what the base's chats have."""
    source = base.chat_template if files.template is None else files.template
    if source is None:
        return None, {}
    names = dict(base.named_tokens)
    for name, token in files.named.items():
        if token is None:
            names.pop(name, None)
        else:
            names[name] = token.content
    changed = (
        name for name in {*names, *base.named_tokens} if names.get(name) != base.named_tokens.get(name)
    )
    is_same = base.chat_template is not None and _meaning(source) == _meaning(base.chat_template)
    if is_same and not any(name in source for name in changed):
        return None, {}
    return source, names


def _meaning(template: str) -> str:
    """Without what jinja leaves out: the kind of line ends, and the last one."""
    return template.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def _ends(tokenizer: Tokenizer, files: TextFiles, base: BaseText) -> frozenset[int]:
    """Ends of an answer that are not the base's."""
    ends = set(files.eos_token_ids)
    named = files.named.get("eos_token")
    if named is not None and named.content != base.tokenizer.named_tokens.get("eos_token"):
        token_id = tokenizer.id_of(named.content)
        assert token_id is not None, "every named token was added"
        ends.add(token_id)
    if beyond := [one for one in ends if one >= base.num_embeddings]:
        raise AdapterIncompatible(
            f"the adapter's answers end with token {beyond[0]}; the served model has embeddings for "
            f"{base.num_embeddings} tokens"
        )
    return frozenset(ends - base.eos_token_ids)
