"""A multipart form with the files of an adapter, read as it comes: files go to disk, values into memory.

The parser is python-multipart's, which keeps nothing. Everything here runs in the pool, a piece of the body
at a time: finding the borders in a hostile body takes long, and so may a disk. Of the names that a client
gives its files only those count that an adapter's files have, and these are the names that they get.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.sources.files import TEXT_FILES, WEIGHTS_FILE, is_pickle, why_no_pickle
from adapters.spec import CONFIG_FILE
from server.api.shapes import shown
from server.errors import BadRequest, PayloadTooLarge

MAX_TEXT_FILE_BYTES = 64 * 2**20  # the largest tokenizers have half of it
_MAX_VALUE_BYTES = 8192
_MAX_PARTS = 64
_NEEDED = (CONFIG_FILE, WEIGHTS_FILE)

FILES = (*_NEEDED, *TEXT_FILES)


def silence_parser() -> None:
    """It would log bytes of what clients send. Idempotent."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


class FormReader:
    """Reads one form into a folder of its own. Calls may come from several threads, one after the other."""

    def __init__(self, content_type: str | None, folder: Path, max_bytes: int) -> None:
        """`max_bytes`: of the whole body. Raises: BadRequest."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._is_closed = False
        self._is_whole = False
        self._num_bytes = 0
        self._num_parts = 0
        self._values: dict[str, bytes] = {}
        self._files: set[str] = set()
        self._header = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._file: FileIO | None = None
        self._take: Callable[[bytes], None] = _ignore
        self._room = 0  # bytes that the part may still have
        self._parser = self._make_parser(content_type)

    def feed(self, data: bytes) -> None:
        """The next piece of the body. Raises: BadRequest, PayloadTooLarge, OSError."""
        with self._lock:
            if self._is_closed:
                return  # the request was given up while this piece waited for its thread
            self._num_bytes += len(data)
            if self._num_bytes > self._max_bytes:
                raise PayloadTooLarge(f"the upload is larger than {self._max_bytes} bytes")
            try:
                self._parser.write(data)
            except FormParserError:
                raise BadRequest("the body is not a valid multipart form") from None

    def finish(self) -> Mapping[str, str]:
        """The form's values, once all of the body was fed. Raises: BadRequest if it is incomplete."""
        if not self._is_whole:
            raise BadRequest("the body ends in the middle of the multipart form")
        for name in _NEEDED:
            if name not in self._files:
                raise BadRequest(f"the form has no file {name}", param=name)
        try:
            return {name: value.decode("utf-8") for name, value in self._values.items()}
        except UnicodeDecodeError:
            raise BadRequest("the values of the form are not UTF-8") from None

    def close(self) -> None:
        """After it nothing is written any more."""
        with self._lock:
            self._is_closed = True
            if self._file is not None:
                self._file.close()
                self._file = None

    # --- What the parser says -----------------------------------------------------------------------------

    def _make_parser(self, content_type: str | None) -> MultipartParser:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if not boundary:
            raise BadRequest("Content-Type names no boundary of the form")
        try:
            return MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_begin": self._begin_header,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open_part,
                    "on_part_data": self._add,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise BadRequest("the boundary of the form is too long") from None

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise BadRequest(f"the form has more than {_MAX_PARTS} parts")
        self._disposition = b""

    def _begin_header(self) -> None:
        self._header.clear()
        self._header_value.clear()

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)

    def _open_part(self) -> None:
        """Decide by its head where a part goes."""
        _, options = parse_options_header(self._disposition)
        field, sent = _text(options.get(b"name")), options.get(b"filename")
        if sent is None and field not in FILES:
            self._open_value(field)
            return
        name = field if field in FILES else _last_part(_text(sent))
        if name not in FILES:
            _refuse_pickle(name)
            self._take, self._room = _ignore, self._max_bytes
            return
        if name in self._files:
            raise BadRequest(f"the form has the file {name} twice", param=name)
        self._files.add(name)
        self._file = FileIO(os.open(self._folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w")
        self._take = self._write
        self._room = self._max_bytes if name == WEIGHTS_FILE else MAX_TEXT_FILE_BYTES

    def _open_value(self, field: str) -> None:
        if field in self._values:
            raise BadRequest(f"the form has the field {shown(field)!r} twice", param=shown(field))
        self._values[field] = b""
        self._room = _MAX_VALUE_BYTES

        def take(data: bytes) -> None:
            self._values[field] += data

        self._take = take

    def _add(self, data: bytes, start: int, end: int) -> None:
        self._room -= end - start
        if self._room < 0:
            raise PayloadTooLarge("a part of the form is too large")
        self._take(data[start:end])

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def _end_part(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())  # the rename that follows must not be on disk before the content
            self._file.close()
            self._file = None

    def _end(self) -> None:
        self._is_whole = True


def _ignore(_: bytes) -> None:
    """What is no file of an adapter: a README, an optimizer's state."""


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")


def _last_part(path: str) -> str:
    """Browsers that send a folder put its name in front."""
    return path.replace("\\", "/").rpartition("/")[2]


def _refuse_pickle(name: str) -> None:
    if is_pickle(name) and name.lower().startswith("adapter_model"):
        raise BadRequest(why_no_pickle(name))
