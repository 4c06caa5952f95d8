"""What an adapter's folder says about text, read as strangers' files are: bounded, as data, and from that
folder alone.

    chat_template.jinja       the chat template; before there was this file it stood in the next
    tokenizer_config.json     names of tokens (eos_token, ...), added tokens
    special_tokens_map.json   \\ what older releases wrote instead
    added_tokens.json         /
    generation_config.json    ids that end an answer
    tokenizer.json            the tokenizer itself: looked at elsewhere, if its digest is not known yet

No file is needed. Which class the config names does not matter: no code but ours ever runs on these files.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from adapters.errors import AdapterInvalid
from adapters.names import shown
from adapters.regular_file import open_regular
from adapters.strict_json import parse_object
from server.text.added_tokens import MAX_ADDED_TOKENS, AddedToken

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
_NAMES_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"
_GENERATION_FILE = "generation_config.json"

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = ("extra_special_tokens", "additional_special_tokens")  # one list under its name and its old name
_DEFAULT_TEMPLATE = "default"

_MAX_TEMPLATE_BYTES = 128 * 1024  # five times the longest of the well-known models
_MAX_JSON_BYTES = 2 * 1024 * 1024
MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024
_DIGEST_BYTES = 16


_LIMITS: Mapping[str, int] = {
    TEMPLATE_FILE: _MAX_TEMPLATE_BYTES,
    CONFIG_FILE: _MAX_JSON_BYTES,
    _NAMES_FILE: _MAX_JSON_BYTES,
    _ADDED_FILE: _MAX_JSON_BYTES,
    _GENERATION_FILE: _MAX_JSON_BYTES,
}


@dataclass(frozen=True, slots=True)
class RawFiles:
    """The files of a folder, not looked at."""

    contents: Mapping[str, bytes]  # of all but tokenizer.json, by name
    tokenizer: str | None  # digest of tokenizer.json

    @property
    def key(self) -> str:
        """Equal for folders with equal files."""
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for name, content in self.contents.items():
            digest.update(f"{name} {len(content)} ".encode())
            digest.update(content)
        digest.update(str(self.tokenizer).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Empty for a folder that says nothing about text."""

    template: str | None = None
    template_file: str = TEMPLATE_FILE  # where it stands
    named: Mapping[str, AddedToken | None] = field(default_factory=dict)  # None: said to be none
    special: tuple[AddedToken, ...] = ()  # without a name
    added: Mapping[str, tuple[int, AddedToken]] = field(default_factory=dict)  # by content, in order of ids
    eos_token_ids: tuple[int, ...] = ()


def read_raw(folder: Path) -> RawFiles:
    """Raises AdapterInvalid, naming the file."""
    contents = {name: _read(folder, name, most) for name, most in _LIMITS.items()}
    present = {name: content for name, content in contents.items() if content is not None}
    return RawFiles(present, _digest_of_tokenizer(folder))


def parse(raw: RawFiles) -> TextFiles:
    """Raises AdapterInvalid, naming the file."""
    config = _read_json(raw, CONFIG_FILE)
    if _wants_code(config):
        raise AdapterInvalid(f"{CONFIG_FILE} asks for a tokenizer with code of its own, which is never run")
    template, template_file = _template(raw, config)
    names, added = config, _added_tokens(config)
    if "added_tokens_decoder" not in config:
        names = {**config, **_read_json(raw, _NAMES_FILE)}
        added = _old_added_tokens(_read_json(raw, _ADDED_FILE), names)
    return TextFiles(
        template=template,
        template_file=template_file,
        named=_named(names),
        special=_special(names),
        added=added,
        eos_token_ids=_eos_token_ids(_read_json(raw, _GENERATION_FILE)),
    )


def digest_of(file: Path) -> str:
    """Raises OSError."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    with open(file, "rb", buffering=0) as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_tokenizer(folder: Path) -> tuple[bytes, str]:
    """The folder's tokenizer.json and its digest. Raises AdapterInvalid."""
    content = _read(folder, TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
    if content is None:
        raise AdapterInvalid(f"{TOKENIZER_FILE} was removed while it was read")
    return content, hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


def _digest_of_tokenizer(folder: Path) -> str | None:
    """None: there is no such file. Raises AdapterInvalid."""
    file = _open(folder, TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
    if file is None:
        return None
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    with file:
        for chunk in _chunks(file, TOKENIZER_FILE, MAX_TOKENIZER_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# --- What they say --------------------------------------------------------------------------------------


def _template(raw: RawFiles, config: Mapping[str, object]) -> tuple[str | None, str]:
    """The chat template, and the file that has it."""
    if TEMPLATE_FILE in raw.contents:
        return _text(raw.contents[TEMPLATE_FILE], TEMPLATE_FILE), TEMPLATE_FILE
    value = config.get("chat_template")
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value if _is_named_template(entry)}
    if isinstance(value, dict):
        if _DEFAULT_TEMPLATE not in value:
            raise AdapterInvalid(f"{CONFIG_FILE}: none of its chat templates is called {_DEFAULT_TEMPLATE}")
        value = value[_DEFAULT_TEMPLATE]
    if value is None:
        return None, CONFIG_FILE
    if not isinstance(value, str) or len(value) > _MAX_TEMPLATE_BYTES or not _is_unicode(value):
        raise AdapterInvalid(f"{CONFIG_FILE}: chat_template is no text of up to {_MAX_TEMPLATE_BYTES} bytes")
    return value, CONFIG_FILE


def _is_named_template(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and "template" in entry


def _wants_code(config: Mapping[str, object]) -> bool:
    code = config.get("auto_map")
    return bool(code.get("AutoTokenizer")) if isinstance(code, dict) else bool(code)


def _named(config: Mapping[str, object]) -> dict[str, AddedToken | None]:
    """The standard names, and others like them, as in "image_token"."""
    found: dict[str, AddedToken | None] = {}
    for key, value in config.items():
        if key in _NAMES:
            found[key] = None if value is None else _token(value, key, CONFIG_FILE)
        elif key.endswith("_token") and isinstance(value, str) and value:
            found[key] = _token(value, key, CONFIG_FILE)
    return found


def _special(config: Mapping[str, object]) -> tuple[AddedToken, ...]:
    value = next((config[key] for key in _MORE if config.get(key)), [])
    values = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(values, list) or len(values) > MAX_ADDED_TOKENS:
        raise AdapterInvalid(f"{CONFIG_FILE}: {_MORE[0]} is no list of tokens")
    return tuple(_token(one, _MORE[0], CONFIG_FILE) for one in values)


def _added_tokens(config: Mapping[str, object]) -> dict[str, tuple[int, AddedToken]]:
    """`added_tokens_decoder`: an object by id."""
    entries = config.get("added_tokens_decoder", {})
    if not isinstance(entries, dict) or len(entries) > MAX_ADDED_TOKENS:
        raise AdapterInvalid(f"{CONFIG_FILE}: added_tokens_decoder is no list of tokens")
    found: dict[int, AddedToken] = {}
    for key, value in entries.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10) or not isinstance(value, dict):
            raise AdapterInvalid(f"{CONFIG_FILE}: {shown(key)} in added_tokens_decoder is no token's id")
        found[int(key)] = _token(value, f"added_tokens_decoder[{key}]", CONFIG_FILE, special=False)
    return {token.content: (token_id, token) for token_id, token in sorted(found.items())}


def _old_added_tokens(
    entries: Mapping[str, object], names: Mapping[str, object]
) -> dict[str, tuple[int, AddedToken]]:
    """added_tokens.json: ids by content; the other files say which ones are special."""
    if len(entries) > MAX_ADDED_TOKENS:
        raise AdapterInvalid(f"{_ADDED_FILE} has more than {MAX_ADDED_TOKENS} tokens")
    special = {token.content for token in (*_named(names).values(), *_special(names)) if token is not None}
    found: list[tuple[int, AddedToken]] = []
    for content, token_id in entries.items():
        if type(token_id) is not int or token_id < 0 or not content:
            raise AdapterInvalid(f"{_ADDED_FILE}: {shown(content)} has no proper id")
        is_special = content in special
        found.append((token_id, AddedToken(content, normalized=not is_special, special=is_special)))
    found.sort(key=lambda one: one[0])
    return {token.content: (token_id, token) for token_id, token in found}


def _token(value: object, key: str, file: str, *, special: bool = True) -> AddedToken:
    token = AddedToken.parse(value, special=special)
    if token is None or not _is_unicode(token.content):
        raise AdapterInvalid(f"{file}: {shown(key)} is no token")
    return token


def _eos_token_ids(config: Mapping[str, object]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > MAX_ADDED_TOKENS or not all(type(one) is int and one >= 0 for one in ids):
        raise AdapterInvalid(f"{_GENERATION_FILE}: eos_token_id is neither an id nor a list of ids")
    return tuple(ids)


def _read_json(raw: RawFiles, name: str) -> dict[str, object]:
    """An object; empty if there is no such file. Raises AdapterInvalid."""
    if name not in raw.contents:
        return {}
    return parse_object(raw.contents[name], name)


def _text(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterInvalid(f"{name} is not UTF-8") from error


def _is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- Reading --------------------------------------------------------------------------------------------


def _read(folder: Path, name: str, most: int) -> bytes | None:
    file = _open(folder, name, most)
    if file is None:
        return None
    with file:
        return b"".join(_chunks(file, name, most))


def _open(folder: Path, name: str, most: int) -> FileIO | None:
    """A file of the folder. None: there is none."""
    path = folder / name
    if path.is_symlink():
        _check_link(folder, path)
    try:
        return open_regular(path, most)
    except FileNotFoundError:
        return None


def _check_link(folder: Path, path: Path) -> None:
    """A link may lead to a file beside it, or into the store of a cache of the hub, where all files of a
    repository lie. What it leads to is shown to clients: a template, and the names of tokens.
    """
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise AdapterInvalid(f"{path.name} cannot be read") from error
    if target.parent != home and target.parent != home.parent.parent / "blobs":
        raise AdapterInvalid(f"{path.name} is a link that leads out of the adapter's folder")


def _chunks(file: FileIO, name: str, most: int) -> Iterator[bytes]:
    """The content, a piece at a time. Raises AdapterInvalid if it is longer than it was a moment ago."""
    done = 0
    try:
        while chunk := file.read(_CHUNK_BYTES):
            done += len(chunk)
            if done > most:
                raise AdapterInvalid(f"{name} has more than {most} bytes")
            yield chunk
    except OSError as error:
        raise AdapterInvalid(f"{name} cannot be read") from error
