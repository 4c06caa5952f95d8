"""An adapter's own chat template, tokens and ends of an answer, where they are not the base's.

Trainers save the whole tokenizer beside every adapter, nearly always the base's. So each folder is reduced to
what it says that the base does not, and most say nothing: then there is no AdapterText. Adapters that say the
same share one, and all tokenizers share the base's vocabulary in memory.

    folder ── small files, digest of tokenizer.json ──> known digest? ── no ──> compared in a sandbox, once
                                                             │
             tokens, frame, template, names, ends  <─────────┘     same as the base? None
                                                                   same as another's? that one's AdapterText

What is served is the base's vocabulary with other added tokens: an id has one row in the model's table of
embeddings, whatever the adapter calls it, so a row may get a name or another one. Where a token that both
tokenizers know has two ids, the adapter was trained on another model, or on one whose rows were moved: keys
and values would still be right, being cached by ids, but the answers would be noise. That is refused, as is
an id beyond the table. A padding token beyond it is left out: it stands beside sequences in training, and
never in one.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

from adapters.errors import AdapterIncompatible, AdapterInvalid, AdapterUnavailable
from adapters.names import shown
from adapters.types import Clock
from server.text.adapter_files import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    TextFiles,
    digest_of,
    read_text_files,
    read_tokenizer,
)
from server.text.added_tokens import MAX_ADDED_CHARS, MAX_ADDED_TOKENS, AddedToken, Frame
from server.text.foreign_template import ForeignTemplate
from server.text.sandbox import Sandbox, SandboxOverrun, SandboxUnavailable
from server.text.tokenizer import Tokenizer

_TEMPLATE_MEMORY_BYTES = 512 * 2**20
_TEMPLATE_CPU_S = 2.0  # templates take milliseconds, for conversations as long as a context
_COMPARISON_MEMORY_BYTES = 2**30
_COMPARISON_CPU_S = 20.0  # the largest vocabularies that there are take two seconds
_CHAT_THREADS = 4
_MAX_FRAME = 16
_MAX_VERDICTS = 256
_RETRY_AFTER_S = 10


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class AdapterText:
    """How an adapter reads and writes. Shared by all adapters that do it alike."""

    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a tokenizer.json says that the base's does not."""

    problem: str | None = None  # why it cannot be used
    added: tuple[tuple[int, AddedToken], ...] = ()
    frame: Frame | None = None  # None: the base's


@dataclass(frozen=True, slots=True)
class _Own:
    """What makes a text the adapter's own. All fields as the base has them: there is none."""

    tokens: tuple[AddedToken, ...] | None = None  # None: the base's, as below
    frame: Frame | None = None
    template: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)  # that the template can see
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def key(self) -> str:
        return repr((self.tokens, self.frame, self.template, sorted(self.names.items()), self._ends))

    @property
    def _ends(self) -> list[int]:
        return sorted(self.eos_token_ids)


class AdapterTexts:
    """One per process, owned by whoever assembles it. `read` runs in the threads that load adapters."""

    def __init__(
        self,
        base: Tokenizer,
        base_folder: Path,
        *,
        num_embeddings: int,
        eos_token_ids: frozenset[int] = frozenset(),
        clock: Clock = time.monotonic,
    ) -> None:
        """`num_embeddings`: rows of the model's table; `eos_token_ids`: what ends the base's answers."""
        self._base = base
        self._num_embeddings = num_embeddings
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._frame = base.frame
        self._base_added = tuple(base.added_tokens.items())
        path = base_folder / TOKENIZER_FILE
        self._base_file = path if path.is_file() else base.to_json()
        self._base_digest = None if isinstance(self._base_file, bytes) else digest_of(path)
        self._sandbox = Sandbox("templates", memory_bytes=_TEMPLATE_MEMORY_BYTES, cpu_s=_TEMPLATE_CPU_S)
        self._chat_pool = ThreadPoolExecutor(_CHAT_THREADS, thread_name_prefix="motet-chat")
        self._lock = threading.Lock()  # of all below
        self._comparing: set[Sandbox] = set()
        self._is_closed = False
        self._verdicts: OrderedDict[str, _Verdict] = OrderedDict()  # by digest, the newest use last
        self._texts: WeakValueDictionary[str, AdapterText] = WeakValueDictionary()

    def read(self, folder: Path) -> AdapterText | None:
        """What the folder brings along; None if that is nothing of its own.

        Raises AdapterInvalid or AdapterIncompatible, naming the file; AdapterUnavailable while the server
        goes down.
        """
        files = read_text_files(folder)
        own = self._own(files, self._verdict(folder, files.digest))
        if own == _Own():
            return None
        key = hashlib.blake2b(own.key.encode(), digest_size=16).hexdigest()
        with self._lock:
            known = self._texts.get(key)
        if known is not None:
            return known
        text = AdapterText(self._make(own, files))
        with self._lock:
            return self._texts.setdefault(key, text)

    def close(self) -> None:
        """Blocks until what runs has ended. `read` may be called still, but finds no sandbox."""
        with self._lock:
            self._is_closed = True
            running = [*self._comparing, self._sandbox]
        for sandbox in running:
            sandbox.close()
        self._chat_pool.shutdown(cancel_futures=True)

    # --- tokenizer.json ---------------------------------------------------------------------------------

    def _verdict(self, folder: Path, digest: str | None) -> _Verdict:
        """Raises AdapterInvalid."""
        if digest is None or digest == self._base_digest:
            return _Verdict(added=self._base_added)
        with self._lock:
            verdict = self._verdicts.get(digest)
            if verdict is not None:
                self._verdicts.move_to_end(digest)
        if verdict is None:
            content, digest = read_tokenizer(folder)
            verdict = self._compared(content)
            with self._lock:
                self._verdicts[digest] = verdict
                while len(self._verdicts) > _MAX_VERDICTS:
                    self._verdicts.popitem(last=False)
        if verdict.problem is not None:
            raise AdapterIncompatible(f"{TOKENIZER_FILE} cannot be used: {verdict.problem}")
        return verdict

    def _compared(self, theirs: bytes) -> _Verdict:
        """In a process of its own: parsing megabytes here would hold up every stream."""
        ours = self._base_file if isinstance(self._base_file, bytes) else self._base_file.read_bytes()
        base = {
            "sections": self._base.sections,
            "model": self._base.model_options,
            "added": [(token.content, token_id) for token_id, token in self._base_added],
        }
        sandbox = Sandbox("tokenizers", memory_bytes=_COMPARISON_MEMORY_BYTES, cpu_s=_COMPARISON_CPU_S)
        with self._lock:
            if self._is_closed:
                raise AdapterUnavailable("the server is shutting down", retry_after_s=_RETRY_AFTER_S)
            self._comparing.add(sandbox)
        try:
            found, _ = sandbox.ask({"base": base}, theirs, ours)
        except SandboxOverrun as error:
            return _Verdict(str(error))
        except SandboxUnavailable as error:
            raise AdapterUnavailable(str(error), retry_after_s=_RETRY_AFTER_S) from error
        finally:
            sandbox.close()
            with self._lock:
                self._comparing.discard(sandbox)
        problem = found.get("refused") or found.get("problem")
        if problem is not None:
            return _Verdict(problem)
        added = ((entry.pop("id"), AddedToken(**entry)) for entry in found["added"])
        frame = found["frame"]
        return _Verdict(
            added=tuple(sorted(added, key=lambda one: one[0])),
            frame=None if frame is None else Frame(tuple(frame["before"]), tuple(frame["after"])),
        )

    # --- What is the adapter's own ----------------------------------------------------------------------

    def _own(self, files: TextFiles, verdict: _Verdict) -> _Own:
        """Raises AdapterInvalid or AdapterIncompatible."""
        tokenizer, tokens, beyond = self._base, self._tokens(files, verdict), None
        if tokens is not None:
            tokenizer = self._base.with_tokens(tokens, None)
            beyond = self._padding_beyond(tokenizer, files)
            if beyond is not None:
                tokens = tuple(token for token in tokens if token.content != beyond)
                tokens = None if tokens == tuple(self._base.added_tokens.values()) else tokens
                tokenizer = self._base if tokens is None else self._base.with_tokens(tokens, None)
        self._check_ids(tokenizer, files, verdict, beyond)
        frame = self._own_frame(tokenizer, verdict)
        template, names = self._own_template(files)
        return _Own(tokens, frame, template, names, self._own_ends(tokenizer, files))

    def _tokens(self, files: TextFiles, verdict: _Verdict) -> tuple[AddedToken, ...] | None:
        """All added tokens, in the order in which transformers adds them; None if they are the base's."""
        found = {token.content: token for _, token in verdict.added}
        named = (token for token in files.named.values() if token is not None)
        for token in (*(token for _, token in files.added.values()), *named, *files.special):
            found.setdefault(token.content, token)
        tokens = tuple(found.values())
        known = tuple(self._base.added_tokens.values())
        if tokens == known:
            return None
        new = {token.content for token in set(tokens).difference(known)}
        if len(tokens) > MAX_ADDED_TOKENS:
            raise AdapterInvalid(f"the adapter's tokenizer has more than {MAX_ADDED_TOKENS} added tokens")
        if long := next((content for content in new if len(content) > MAX_ADDED_CHARS), None):
            raise AdapterInvalid(
                f"token {shown(long)} of the adapter has more than {MAX_ADDED_CHARS} characters"
            )
        return tokens

    def _padding_beyond(self, tokenizer: Tokenizer, files: TextFiles) -> str | None:
        """The padding token, if the model has no row for it."""
        padding = files.named.get("pad_token")
        if padding is None or padding in (files.named.get(name) for name in ("bos_token", "eos_token")):
            return None
        is_beyond = (tokenizer.id_of(padding.content) or 0) >= self._num_embeddings
        return padding.content if is_beyond and self._base.id_of(padding.content) is None else None

    def _check_ids(
        self, tokenizer: Tokenizer, files: TextFiles, verdict: _Verdict, left_out: str | None
    ) -> None:
        """Whether each token has the id that the files give it, and the model a row for it."""
        asked = [(token.content, token_id) for token_id, token in (*verdict.added, *files.added.values())]
        for content, token_id in asked:
            known = self._base.id_of(content)
            if known not in (None, token_id):
                raise AdapterIncompatible(
                    f"token {shown(content)} has the id {token_id} in the adapter's tokenizer, and {known} "
                    f"in the served model's: the adapter was not trained on this model"
                )
            if content != left_out and tokenizer.id_of(content) != token_id:
                raise AdapterIncompatible(
                    f"token {shown(content)} of the adapter cannot have the id {token_id}: after the served "
                    f"model's tokens it would be {tokenizer.id_of(content)}"
                )
        for token_id, token in tokenizer.added_tokens.items():
            if token_id >= self._num_embeddings and self._base.id_of(token.content) is None:
                raise AdapterIncompatible(
                    f"token {shown(token.content)} of the adapter has the id {token_id}; the served model "
                    f"has embeddings for {self._num_embeddings} tokens"
                )

    def _own_frame(self, tokenizer: Tokenizer, verdict: _Verdict) -> Frame | None:
        """None: what the base puts around a text."""
        frame = verdict.frame
        if frame is None or frame == self._frame:
            return None
        ids = (*frame.before, *frame.after)
        if len(ids) > _MAX_FRAME or not all(self._is_token(tokenizer, one) for one in ids):
            raise AdapterInvalid(f"{TOKENIZER_FILE} puts tokens around a text that cannot be served")
        return frame

    def _is_token(self, tokenizer: Tokenizer, token_id: int) -> bool:
        return 0 <= token_id < self._num_embeddings and tokenizer.token_of(token_id) is not None

    def _own_template(self, files: TextFiles) -> tuple[str | None, dict[str, str]]:
        """The template and the names that it sees, if either differs from what the base's chats have."""
        source = self._base.chat_template if files.template is None else files.template
        if source is None:
            return None, {}
        names = dict(self._base.named_tokens)
        for name, token in files.named.items():
            if token is None:
                names.pop(name, None)
            else:
                names[name] = token.content
        known = self._base.named_tokens
        changed = [name for name in {*names, *known} if names.get(name) != known.get(name)]
        is_same = self._base.chat_template is not None and _meaning(source) == _meaning(
            self._base.chat_template
        )
        if is_same and not any(name in source for name in changed):
            return None, {}
        return source, names

    def _own_ends(self, tokenizer: Tokenizer, files: TextFiles) -> frozenset[int]:
        """Ends of an answer that are not the base's."""
        ends = set(files.eos_token_ids)
        named = files.named.get("eos_token")
        if named is not None and named.content != self._base.named_tokens.get("eos_token"):
            token_id = tokenizer.id_of(named.content)
            assert token_id is not None, "every named token was added"
            ends.add(token_id)
        if beyond := [one for one in ends if one >= self._num_embeddings]:
            raise AdapterIncompatible(
                f"the adapter's answers end with token {beyond[0]}; the served model has embeddings for "
                f"{self._num_embeddings} tokens"
            )
        return frozenset(ends - self._eos_token_ids)

    def _make(self, own: _Own, files: TextFiles) -> Tokenizer:
        """Raises AdapterInvalid for a template that is no program; AdapterUnavailable."""
        tokenizer = self._base
        if own.tokens is not None or own.frame is not None:
            tokens = self._base.added_tokens.values() if own.tokens is None else own.tokens
            tokenizer = self._base.with_tokens(tokens, own.frame)
        if own.template is None:
            return tokenizer.with_ends(own.eos_token_ids)
        template = ForeignTemplate(own.template, own.names, self._sandbox, self._clock)
        try:
            problem = template.check()
        except SandboxUnavailable as error:
            raise AdapterUnavailable(str(error), retry_after_s=_RETRY_AFTER_S) from error
        if problem is not None:
            file = CONFIG_FILE if files.template is None else files.template_file
            raise AdapterInvalid(f"{file} has no usable chat template: {problem}")
        return tokenizer.with_ends(own.eos_token_ids).with_template(template, self._chat_pool)


def _meaning(template: str) -> str:
    """Without what jinja leaves out: the kind of line ends, and the last one."""
    return template.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
