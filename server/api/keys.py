"""API keys: the one of `--api-key`, and those of a file that is read again when it changes.

    # one key a line; options after it
    sk-7f0c2a9d4e                 name=alice
    sk-1b52c77e90                 name=bob    adapters=pirate,team-b/*  base=no
    sk-55ad01f3c2                 name=carol  weight=2  requests=8  tokens-per-minute=60000
    sha256:9f86d081884c7d65...    name=ops    admin=yes

A key stands there as it is, or as `sha256:` and the 64 hexadecimal digits of its digest. `adapters=` limits
it to these names (shell patterns, `*` also over slashes; nothing after `=`: none), `base=no` keeps it from
the base model, `admin=yes` lets it change the server. Without options a key may use everything and change
nothing. `weight=` is of its share where shares go by key; `requests=` and `tokens-per-minute=` are hard
limits in place of those for all keys. The last line must end, so that a file of which only half is written is
not taken for a whole one.

What a client brings is hashed and compared with every key in constant time. At most once a second a request
waits for the file to be read again, in a thread and not for long; what cannot be read or understood leaves
the old keys in force and one line in the log.
"""

import asyncio
import fnmatch
import hashlib
import hmac
import logging
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.types import Clock
from server.api.caller import Caller, digest_of

log = logging.getLogger("motet.api")

_MAX_BYTES = 1 << 20
_MAX_KEYS = 4096  # all are compared for each request: about 150 nanoseconds each
_CHECK_EVERY_S = 1.0
_PATIENCE_S = 0.5  # how long requests wait for a file system that does not answer
_NAME = re.compile(r"[A-Za-z0-9._@/-]{1,64}")
_WEIGHT = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
_COUNT = re.compile(r"[0-9]{1,12}")
_OPTIONS = ("name", "adapters", "base", "admin", "weight", "requests", "tokens-per-minute")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_DIGEST_PREFIX = "sha256:"


class KeysError(Exception):
    """A file of keys cannot be used; the message is for the operator and holds nothing of its content."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key that is in force. The key itself is not kept."""

    sha256: bytes
    caller: Caller


def parse_keys(text: str) -> tuple[Key, ...]:
    """The keys of a file. Raises: KeysError that names the line."""
    if text and not text.endswith("\n"):
        raise KeysError("its last line does not end: it may not be complete")
    keys: list[Key] = []
    line_of: dict[bytes, int] = {}
    for number, words in _lines(text):
        key = _key(number, words)
        if key.sha256 in line_of:
            raise KeysError(f"line {number} has the key of line {line_of[key.sha256]} again")
        line_of[key.sha256] = number
        keys.append(key)
    if not keys:
        raise KeysError("it holds no key")
    if len(keys) > _MAX_KEYS:
        raise KeysError(f"it holds more than {_MAX_KEYS} keys")
    return tuple(keys)


class KeyRing:
    """All keys in force. Belongs to the event loop."""

    def __init__(self, api_key: str | None, file: Path | None, clock: Clock) -> None:
        """Reads the file, and raises KeysError if it cannot be used."""
        self._fixed: tuple[Key, ...] = () if api_key is None else (_whole_key(api_key),)
        self._keys: tuple[Key, ...] = self._fixed
        self._file = file
        self._clock = clock
        self._checking: asyncio.Task[None] | None = None
        if file is not None:
            self._checked_at = clock()
            self._found = _look(file, None)
            if self._found.error is not None:
                raise KeysError(f"{file}: {self._found.error}")
            self._keys += self._found.keys

    async def find(self, candidates: Sequence[bytes]) -> Caller | None:
        """Whose key one of these is; of several the first."""
        if self._file is not None:
            await self._keep_current(self._file)
        caller: Caller | None = None
        for candidate in candidates:
            digest = hashlib.sha256(candidate).digest()
            for key in self._keys:  # every one: how long it takes says nothing about which one it was
                if hmac.compare_digest(digest, key.sha256) and caller is None:
                    caller = key.caller
        return caller

    async def _keep_current(self, file: Path) -> None:
        """Look at the file again if that was not done within the last second; for all who ask meanwhile."""
        now = self._clock()
        if self._checking is None and now - self._checked_at >= _CHECK_EVERY_S:
            self._checked_at = now
            self._checking = asyncio.create_task(self._check(file))
        if self._checking is not None and (left := self._checked_at + _PATIENCE_S - now) > 0:
            await asyncio.wait((self._checking,), timeout=left)

    async def _check(self, file: Path) -> None:
        try:
            before, self._found = self._found, await asyncio.to_thread(_look, file, self._found)
        finally:
            self._checking = None
        if self._found.error is None:
            if self._found.digest != before.digest:
                self._keys = (*self._fixed, *self._found.keys)
                log.info("the file of API keys has changed: %d keys are in force", len(self._keys))
        elif self._found.error != before.error:
            log.error("the file of API keys is not used, the old keys stay: %s", self._found.error)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a look at the file found."""

    digest: bytes  # of its content; b"" if it could not be read
    keys: tuple[Key, ...] = ()
    error: str | None = None


def _look(file: Path, before: _Found | None) -> _Found:
    """Read the file, and understand it if it is not what it was `before`. Not on the event loop."""
    digest = b""
    try:
        content = _read(file)
        digest = hashlib.sha256(content).digest()
        if before is not None and digest == before.digest:
            return before
        return _Found(digest, parse_keys(_decode(content)))
    except KeysError as error:
        return _Found(digest, error=str(error))


def _read(file: Path) -> bytes:
    """Raises: KeysError."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise KeysError("it is not a regular file")
        with file.open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise KeysError(error.strerror or type(error).__name__) from None
    if len(content) > _MAX_BYTES:
        raise KeysError(f"it is larger than {_MAX_BYTES} bytes")
    return content


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise KeysError(f"it is not valid UTF-8 (byte {error.start})") from None


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Numbers and words of the lines that hold a key; a word that begins with # ends its line."""
    for number, line in enumerate(text.split("\n"), 1):
        words: list[str] = []
        for word in line.split():
            if word.startswith("#"):
                break
            words.append(word)
        if words:
            yield number, words


def _key(number: int, words: list[str]) -> Key:
    written, *options = words
    if written.startswith(_DIGEST_PREFIX):
        digits = written.removeprefix(_DIGEST_PREFIX)
        if not _DIGEST.fullmatch(digits):
            raise KeysError(f"line {number}: sha256: is followed by 64 hexadecimal digits")
        sha256 = bytes.fromhex(digits)
    else:
        sha256 = hashlib.sha256(written.encode("utf-8")).digest()
    name: str | None = None
    is_admin, has_base = False, True
    adapters: re.Pattern[str] | None = None
    weight: float | None = None
    limits: dict[str, int] = {}
    seen: set[str] = set()
    for option in options:
        word, equals, value = option.partition("=")
        if not equals or word not in _OPTIONS:
            known = ", ".join(f"{option}=" for option in _OPTIONS)
            raise KeysError(f"line {number}: after the key there may be {known}")
        if word in seen:
            raise KeysError(f"line {number}: {word}= is there twice")
        seen.add(word)
        if word == "name":
            if not _NAME.fullmatch(value):
                raise KeysError(f"line {number}: name= takes up to 64 letters, digits and any of . _ @ / -")
            name = value
        elif word == "adapters":
            adapters = _patterns(value)
        elif word == "base":
            has_base = _yes_or_no(number, word, value)
        elif word == "weight":
            if not _WEIGHT.fullmatch(value) or not (weight := float(value)):
                raise KeysError(f"line {number}: weight= takes a number above 0")
        elif word in ("requests", "tokens-per-minute"):
            if not _COUNT.fullmatch(value) or not int(value):
                raise KeysError(f"line {number}: {word}= takes a whole number above 0")
            limits[word] = int(value)
        else:
            is_admin = _yes_or_no(number, word, value)
    caller = Caller(
        name,
        digest_of(sha256),
        is_admin=is_admin,
        has_base=has_base,
        adapters=adapters,
        weight=weight,
        max_requests=limits.get("requests"),
        tokens_per_minute=limits.get("tokens-per-minute"),
    )
    return Key(sha256, caller)


def _whole_key(api_key: str) -> Key:
    """The key of `--api-key`: it may do everything."""
    sha256 = hashlib.sha256(api_key.encode("utf-8")).digest()
    return Key(sha256, Caller(None, digest_of(sha256), is_admin=True))


def _patterns(value: str) -> re.Pattern[str] | None:
    globs = [glob for glob in value.split(",") if glob]
    if "*" in globs:
        return None
    return re.compile("|".join(fnmatch.translate(glob) for glob in globs) or r"(?!)")


def _yes_or_no(number: int, word: str, value: str) -> bool:
    if value not in ("yes", "no"):
        raise KeysError(f"line {number}: {word}= takes yes or no")
    return value == "yes"
