"""One file over HTTP, with an end to its bytes and to its time.

What the server announces is believed only as far as it agrees with what the listing said; what it sends is
counted while it arrives and never written beyond that. A connection that breaks is taken up again where it
broke. Redirects are followed one by one: their bodies are not read, and what authorizes us goes only where
we were told to ask. Neither an address nor a header ever gets into an error: both may hold secrets.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import BinaryIO, TypeVar

import httpx2

from adapters.errors import AdapterUnavailable
from adapters.sources.limits import Deadline, RemoteFile
from adapters.sources.remote import out_of_reach

logger = logging.getLogger(__name__)

_SILENCE_S = 10.0  # that a server may keep us waiting for a connection, or for the next bytes
_MAX_REDIRECTS = 5
_ATTEMPTS = 3
_FIRST_WAIT_S = 0.25
_BUSY = (500, 502, 503, 504)  # worth another attempt at once
_LONGEST_RETRY_S = 60
T = TypeVar("T")


class Refused(Exception):
    """The server answered, but not with what was asked for."""

    def __init__(self, status: int, *, code: str = "", retry_after_s: int | None = None) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.code = code  # the hub's own word for it
        self.retry_after_s = retry_after_s


class _Broken(Exception):
    """The connection failed or broke off; `reason` is a type's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Downloader:
    """Keeps connections open between requests, and no cookies. From any thread."""

    def __init__(self, where: str, wait: Callable[[float], None] = time.sleep) -> None:
        """`where`: what clients are told when it fails. `wait` gets the seconds between two attempts."""
        self._where = where
        self._wait = wait
        self._closing = threading.Event()
        self._client = httpx2.Client(
            headers={"User-Agent": "motet", "Accept-Encoding": "identity"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            follow_redirects=False,
        )

    def deadline(self, seconds: float) -> Deadline:
        """So long from now, or until this is closed."""
        return Deadline(seconds, closing=self._closing)

    def close(self) -> None:
        """What waits gives up."""
        self._closing.set()
        self._client.close()

    def head(self, url: str, headers: Mapping[str, str], deadline: Deadline) -> Mapping[str, str]:
        """The headers of the first answer that does not send us elsewhere on the same host.

        Raises Refused, AdapterUnavailable.
        """
        return self._insist(lambda: self._head(url, headers, deadline), deadline)

    def read(self, url: str, headers: Mapping[str, str], max_bytes: int, deadline: Deadline) -> bytes:
        """A small body. Raises Refused, AdapterUnavailable."""
        return self._insist(lambda: self._read(url, headers, max_bytes, deadline), deadline)

    def save(
        self, url: str, headers: Mapping[str, str], file: RemoteFile, path: Path, deadline: Deadline
    ) -> None:
        """Write the file, whose path must not exist. What went wrong leaves a part of it behind.

        Raises Refused, AdapterUnavailable, and OSError for what the disk says.
        """
        with path.open("xb") as out:
            written = _Written(out, file)
            self._insist(lambda: self._append(url, headers, written, deadline), deadline)
            if not written.is_right():
                raise self._wrong(f"{file.name} does not hash to what the listing said")

    def _head(self, url: str, headers: Mapping[str, str], deadline: Deadline) -> Mapping[str, str]:
        with self._open("HEAD", url, headers, deadline) as response:
            return response.headers

    def _read(self, url: str, headers: Mapping[str, str], max_bytes: int, deadline: Deadline) -> bytes:
        body = bytearray()
        with self._open("GET", url, headers, deadline) as response:
            for piece in response.iter_raw():
                deadline.left()
                body += piece
                if len(body) > max_bytes:
                    raise self._wrong(f"an answer is longer than {max_bytes} bytes")
        return bytes(body)

    def _append(self, url: str, headers: Mapping[str, str], written: "_Written", deadline: Deadline) -> None:
        """Write what is still missing, or all of it again where the server does not know ranges."""
        name, wanted = written.file.name, written.file.num_bytes
        if written.num_bytes:
            headers = {**headers, "Range": f"bytes={written.num_bytes}-"}
        with self._open("GET", url, headers, deadline) as response:
            if response.status_code == 200 and written.num_bytes:
                written.restart()
            begun = response.headers.get("Content-Range", "").startswith(f"bytes {written.num_bytes}-")
            if response.status_code == 206 and not begun:
                raise self._wrong(f"{name} comes with another range than was asked for")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise self._wrong(f"{name} comes encoded")
            announced = response.headers.get("Content-Length")
            if announced is not None and announced != str(wanted - written.num_bytes):
                raise self._wrong(f"{name} is announced with another size than the listing said")
            for piece in response.iter_raw():
                deadline.left()
                if written.num_bytes + len(piece) > wanted:
                    raise self._wrong(f"{name} has more bytes than the listing said")
                written.add(piece)
        if written.num_bytes < wanted:
            raise _Broken("EndedEarly")

    @contextmanager
    def _open(
        self, method: str, url: str, headers: Mapping[str, str], deadline: Deadline
    ) -> Iterator[httpx2.Response]:
        """An answer of 200 or 206; for HEAD also one that leads to another host. Raises Refused, _Broken."""
        try:
            request = self._client.build_request(
                method, url, headers=headers, timeout=min(_SILENCE_S, deadline.left())
            )
            for _ in range(_MAX_REDIRECTS + 1):
                response = self._client.send(request, stream=True)
                try:
                    following = response.next_request
                    is_last = following is None or (method == "HEAD" and _leads_away(request, following))
                    if is_last:
                        if response.status_code not in (200, 206) and following is None:
                            raise _refusal(response)
                        yield response
                        return
                finally:
                    response.close()
                assert following is not None
                deadline.left()
                request = following
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            broken = type(error).__name__
        except RuntimeError:
            if not self._client.is_closed:
                raise
            broken = "Closed"
        else:
            raise self._wrong(f"more than {_MAX_REDIRECTS} redirects")
        raise _Broken(broken)  # outside of `except`: the library's error holds the request and its headers

    def _insist(self, attempt: Callable[[], T], deadline: Deadline) -> T:
        """Up to three attempts, as long as it looks like a hiccup."""
        for number in range(_ATTEMPTS):
            try:
                return attempt()
            except _Broken as error:
                reason = error.reason
            except Refused as error:
                if error.status not in _BUSY:
                    raise
                reason = str(error)
            if number + 1 < _ATTEMPTS:
                self._wait(min(_FIRST_WAIT_S * 4**number, deadline.left()))
        logger.warning("%s: gave up after %d attempts: %s", self._where, _ATTEMPTS, reason)
        raise out_of_reach(self._where)

    def _wrong(self, what: str) -> AdapterUnavailable:
        """Say in the log what the server did; clients only hear that it failed."""
        logger.warning("%s: %s", self._where, what)
        return out_of_reach(self._where)


class _Written:
    """A file as far as it was received, and its hash."""

    def __init__(self, out: BinaryIO, file: RemoteFile) -> None:
        self.file = file
        self._out = out
        self.restart()

    def restart(self) -> None:
        self._out.seek(0)
        self._out.truncate()
        self.num_bytes = 0
        self._hash = _hash_of(self.file)

    def add(self, piece: bytes) -> None:
        self._out.write(piece)
        self.num_bytes += len(piece)
        self._hash.update(piece)

    def is_right(self) -> bool:
        checksum = self.file.checksum
        return checksum is None or self._hash.hexdigest() == checksum.hexdigest


def _hash_of(file: RemoteFile) -> "hashlib._Hash":
    if file.checksum is not None and file.checksum.kind == "git":
        return hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False)
    return hashlib.sha256()


def _leads_away(request: httpx2.Request, following: httpx2.Request) -> bool:
    return request.url.origin != following.url.origin


def _refusal(response: httpx2.Response) -> Refused:
    after = response.headers.get("Retry-After", "")
    return Refused(
        response.status_code,
        code=response.headers.get("X-Error-Code", ""),
        retry_after_s=min(int(after), _LONGEST_RETRY_S) if after.isdecimal() else None,
    )
