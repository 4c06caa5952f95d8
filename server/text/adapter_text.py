"""An adapter's own chat template, tokens and ends of an answer, where they are not the base's.

Trainers save the whole tokenizer beside every adapter, nearly always the base's. So each folder is reduced to
what it says that the base does not, and most say nothing: then there is no AdapterText. Adapters that say the
same share one, and all tokenizers share the base's vocabulary in memory.

    folder ── small files, digest of tokenizer.json ──> known digest? ── no ──> compared in a sandbox, once
                                                             │
             tokens, frame, template, names, ends  <─────────┘     same as the base? None
                                                                   same as another's? that one's AdapterText
"""

import hashlib
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from adapters.errors import AdapterIncompatible, AdapterInvalid, AdapterUnavailable
from adapters.types import Clock
from server.text.adapter_files import (
    TOKENIZER_FILE,
    RawFiles,
    digest_of,
    parse,
    read_raw,
    read_tokenizer,
)
from server.text.added_tokens import AddedToken, Frame
from server.text.foreign_template import ForeignTemplate
from server.text.own_text import BaseText, OwnText, Verdict, find_own_text
from server.text.sandbox import Sandbox, SandboxOverrun, SandboxUnavailable
from server.text.tokenizer import Tokenizer

_TEMPLATE_MEMORY_BYTES = 512 * 2**20
_TEMPLATE_CPU_S = 2.0  # templates take milliseconds, for conversations as long as a context
_COMPARISON_MEMORY_BYTES = 2**30
_COMPARISON_CPU_S = 20.0  # the largest vocabularies that there are take two seconds
_CHAT_THREADS = 4
_MAX_VERDICTS = 256
_MAX_SEEN = 4096
_DIGEST_BYTES = 16
_RETRY_AFTER_S = 10


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class AdapterText:
    """How an adapter reads and writes. Shared by all adapters that do it alike."""

    tokenizer: Tokenizer


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
        self._base = BaseText(base, base.frame, num_embeddings, eos_token_ids)
        self._base_added = tuple(base.added_tokens.items())
        self._clock = clock
        path = base_folder / TOKENIZER_FILE
        self._base_file = path if path.is_file() else base.to_json()
        self._base_digest = None if isinstance(self._base_file, bytes) else digest_of(path)
        self._sandbox = Sandbox("templates", memory_bytes=_TEMPLATE_MEMORY_BYTES, cpu_s=_TEMPLATE_CPU_S)
        self._chat_pool = ThreadPoolExecutor(_CHAT_THREADS, thread_name_prefix="motet-chat")
        self._lock = threading.Lock()  # of all below
        self._comparing: set[Sandbox] = set()
        self._is_closed = False
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()  # by digest, the newest use last
        self._seen: OrderedDict[str, str | None] = OrderedDict()  # key of files: key of text, likewise
        self._texts: WeakValueDictionary[str, AdapterText] = WeakValueDictionary()

    def read(self, folder: Path) -> AdapterText | None:
        """What the folder brings along; None if that is nothing of its own.

        Raises AdapterInvalid or AdapterIncompatible, naming the file; AdapterUnavailable while the server
        goes down.
        """
        raw = read_raw(folder)
        is_known, text = self._known(raw.key)
        return text if is_known else self._find(folder, raw)

    def close(self) -> None:
        """Blocks until what runs has ended. `read` may be called still, but finds no sandbox."""
        with self._lock:
            self._is_closed = True
            running = [*self._comparing, self._sandbox]
        for sandbox in running:
            sandbox.close()
        self._chat_pool.shutdown(cancel_futures=True)

    def _known(self, key: str) -> tuple[bool, AdapterText | None]:
        """Whether such files were read before and what they say is still here, and what that is."""
        with self._lock:
            if key not in self._seen:
                return False, None
            self._seen.move_to_end(key)
            text_key = self._seen[key]
            text = None if text_key is None else self._texts.get(text_key)
            return text is not None or text_key is None, text

    def _find(self, folder: Path, raw: RawFiles) -> AdapterText | None:
        files = parse(raw)
        own, tokenizer = find_own_text(files, self._verdict(folder, raw.tokenizer), self._base)
        if own == OwnText():
            self._note(raw.key, None, None)
            return None
        key = hashlib.blake2b(own.key.encode(), digest_size=_DIGEST_BYTES).hexdigest()
        with self._lock:
            text = self._texts.get(key)
        if text is None:
            text = AdapterText(self._make(own, tokenizer, files.template_file))
        return self._note(raw.key, key, text)

    def _note(self, key: str, text_key: str | None, text: AdapterText | None) -> AdapterText | None:
        """Remember what such files say. The text, or the equal one that somebody else has just made."""
        with self._lock:
            self._seen[key] = text_key
            while len(self._seen) > _MAX_SEEN:
                self._seen.popitem(last=False)
            return text if text_key is None or text is None else self._texts.setdefault(text_key, text)

    def _make(self, own: OwnText, tokenizer: Tokenizer, template_file: str) -> Tokenizer:
        """Raises AdapterInvalid for a template that is no program; AdapterUnavailable."""
        if own.frame is not None:
            tokenizer = tokenizer.with_frame(own.frame)
        tokenizer = tokenizer.with_ends(own.eos_token_ids)
        if own.template is None:
            return tokenizer
        template = ForeignTemplate(own.template, own.names, self._sandbox, self._clock)
        try:
            problem = template.check()
        except SandboxUnavailable as error:
            raise AdapterUnavailable(str(error), retry_after_s=_RETRY_AFTER_S) from error
        if problem is not None:
            raise AdapterInvalid(f"{template_file} has no usable chat template: {problem}")
        return tokenizer.with_template(template, self._chat_pool)

    # --- tokenizer.json ---------------------------------------------------------------------------------

    def _verdict(self, folder: Path, digest: str | None) -> Verdict:
        """Raises AdapterInvalid."""
        if digest is None or digest == self._base_digest:
            return Verdict(added=self._base_added)
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

    def _compared(self, theirs: bytes) -> Verdict:
        """In a process of its own: parsing megabytes here would hold up every stream."""
        ours = self._base_file if isinstance(self._base_file, bytes) else self._base_file.read_bytes()
        base = {
            "sections": self._base.tokenizer.sections,
            "model": self._base.tokenizer.model_options,
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
            return Verdict(str(error))
        except SandboxUnavailable as error:
            raise AdapterUnavailable(str(error), retry_after_s=_RETRY_AFTER_S) from error
        finally:
            sandbox.close()
            with self._lock:
                self._comparing.discard(sandbox)
        problem = found.get("refused") or found.get("problem")
        if problem is not None:
            return Verdict(problem)
        added = ((entry.pop("id"), AddedToken(**entry)) for entry in found["added"])
        frame = found["frame"]
        return Verdict(
            added=tuple(sorted(added, key=lambda one: one[0])),
            frame=None if frame is None else Frame(tuple(frame["before"]), tuple(frame["after"])),
        )
