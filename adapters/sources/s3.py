"""Adapters in S3 and what speaks like it: `s3://bucket/prefix`, whose objects are the adapter's files.

The version is a digest of the names, sizes and ETags of those files, and each is read only as long as it
still has its ETag: an adapter that is replaced meanwhile is an error and not a mixture. The server's own
credentials read, whoever asks; therefore only buckets that the operator named may be asked for, and a
request's token, which could decide nothing, is refused.

botocore lists and signs; the bytes come through `Downloader`, which has an end to bytes and time. A signed
address is a secret for as long as it lives: it is made for one fetch, and is never logged.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from adapters.errors import AdapterError, AdapterInvalid
from adapters.names import shown
from adapters.sources.cache import VersionCache, cache_key
from adapters.sources.download import Downloader, Refused
from adapters.sources.files import is_folder_name
from adapters.sources.limits import Deadline, FetchLimits, RemoteFile, refuse_many, select_files
from adapters.sources.local import LocalSource
from adapters.sources.remote import has_changed, no_such_adapter, out_of_reach

logger = logging.getLogger(__name__)

SCHEME = "s3://"
_ANSWER_S = 10.0  # for the question that every request asks
_SILENCE_S = 5.0  # that the service may keep us waiting for the next bytes of a listing
_PAGE = 1000  # keys in one answer; S3 gives no more
_MAX_KEY_BYTES = 1024
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_DIGEST_BYTES = 16
_WHERE = "the S3 service"
_GONE = (404, 412)


@dataclass(frozen=True, slots=True)
class _Place:
    """A location in its two parts. The prefix has no slash at its end, and may be empty."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, location: str) -> "_Place | None":
        if not location.startswith(SCHEME):
            return None
        bucket, _, prefix = location.removeprefix(SCHEME).partition("/")
        prefix = prefix.removesuffix("/")
        if not _BUCKET.fullmatch(bucket) or len(prefix.encode("utf-8", "surrogatepass")) > _MAX_KEY_BYTES:
            return None
        if prefix and not all(is_folder_name(part) for part in prefix.split("/")):
            return None
        return cls(bucket, prefix)

    def is_below(self, root: "_Place") -> bool:
        """Part by part: "a/b" is below "a", "ab" is not."""
        return self.bucket == root.bucket and f"{self.prefix}/".startswith(
            f"{root.prefix}/" if root.prefix else ""
        )

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name


class S3Source:
    """A `RemoteSource`. From any thread."""

    name = "s3"

    def __init__(
        self,
        cache: VersionCache,
        limits: FetchLimits,
        roots: tuple[str, ...],
        *,
        endpoint_url: str | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """`roots`: buckets that may be read, or "bucket/prefix" for a part of one.

        `endpoint_url`: of a service that is not AWS. Credentials and region are found where AWS's own tools
        find them. `wait` gets the seconds between two attempts. Raises ValueError for a root or an address
        that cannot be one.
        """
        self._cache = cache
        self._limits = limits
        self._endpoint = endpoint_url or ""
        self._roots = tuple(_root(root) for root in roots)
        self._client = _client(endpoint_url)
        self._http = Downloader(_WHERE, wait)
        self._fetched = LocalSource((cache.root,), None)

    def accepts(self, location: str) -> bool:
        return _Place.parse(location) is not None

    def close(self) -> None:
        self._http.close()
        self._client.close()

    def resolve(self, location: str, token: str | None) -> str:
        """A digest of the listing. See `RemoteSource`."""
        place = self._allowed(location, token)
        return _digest(self._list(location, place, self._http.deadline(_ANSWER_S)))

    def fetch(self, location: str, version: str, token: str | None) -> Path:
        """The files that had this digest. See `RemoteSource`."""
        place = self._allowed(location, token)
        key = cache_key(self.name, self._endpoint, place.bucket, place.prefix, version)
        folder = self._cache.get(key) or self._download(location, place, version, key)
        return self._fetched.check_path(folder)

    def _download(self, location: str, place: _Place, version: str, key: str) -> Path:
        deadline = self._http.deadline(self._limits.seconds)
        files = self._list(location, place, deadline)
        if _digest(files) != version:
            raise has_changed(location)

        def fill(folder: Path) -> None:
            for file in files:
                url = self._signed(place, file)
                self._http.save(url, {"If-Match": file.etag}, file, folder / file.name, deadline)

        try:
            return self._cache.obtain(key, sum(file.num_bytes for file in files), deadline, fill)
        except Refused as error:
            status = error.status
        except BotoCoreError as error:
            raise _failed(place, type(error).__name__) from None
        if status in _GONE:
            raise has_changed(location)
        raise _failed(place, f"status {status}")

    # --- Listing ------------------------------------------------------------------------------------------

    def _allowed(self, location: str, token: str | None) -> _Place:
        place = _Place.parse(location)
        if place is None:
            raise AdapterInvalid(f"{shown(location)} is not of the form s3://bucket/prefix")
        if not any(place.is_below(root) for root in self._roots):
            raise AdapterInvalid(f"{shown(location)} is outside the buckets that adapters may be loaded from")
        if token:
            raise AdapterInvalid(
                "api_token has no meaning for S3, which is read with the server's own credentials"
            )
        return place

    def _list(self, location: str, place: _Place, deadline: Deadline) -> tuple[RemoteFile, ...]:
        """The adapter's files, checked against the limits."""
        files: list[RemoteFile] = []
        num_keys = 0
        try:
            for page in self._pages(place, deadline):
                contents = page.get("Contents", [])
                num_keys += len(contents) + len(page.get("CommonPrefixes", []))
                refuse_many(num_keys, self._limits)
                files += [file for one in contents if (file := _described(place, one)) is not None]
        except ClientError as error:
            code, status = _said(error)
        except (BotoCoreError, KeyError, TypeError, ValueError) as error:
            raise _failed(place, type(error).__name__) from None
        else:
            if not files:
                raise no_such_adapter(location)
            return select_files(files, self._limits)
        if status == 404:
            raise no_such_adapter(location)
        failure: AdapterError = _failed(place, code)
        raise no_such_adapter(location) if status == 403 else failure

    def _pages(self, place: _Place, deadline: Deadline) -> Iterator[dict[str, Any]]:
        more: dict[str, str] = {}
        while True:
            deadline.left()
            page = self._client.list_objects_v2(
                Bucket=place.bucket, Prefix=place.key(""), Delimiter="/", MaxKeys=_PAGE, **more
            )
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _signed(self, place: _Place, file: RemoteFile) -> str:
        """An address that is good for as long as a fetch may take."""
        wanted = {"Bucket": place.bucket, "Key": place.key(file.name), "IfMatch": file.etag}
        url: str = self._client.generate_presigned_url(
            "get_object", Params=wanted, ExpiresIn=int(self._limits.seconds) + 60
        )
        return url


def _client(endpoint_url: str | None) -> Any:
    """Of a service that is not AWS, botocore puts the bucket into the path, where all of them know it."""
    config = Config(
        signature_version="s3v4",
        connect_timeout=_SILENCE_S,
        read_timeout=_SILENCE_S,
        retries={"mode": "standard", "total_max_attempts": 2},
        user_agent="motet",
    )
    return botocore.session.Session().create_client("s3", endpoint_url=endpoint_url, config=config)


def _root(text: str) -> _Place:
    place = _Place.parse(text if text.startswith(SCHEME) else SCHEME + text)
    if place is None:
        raise ValueError(f"{text!r} is not a bucket, and not of the form bucket/prefix")
    return place


def _described(place: _Place, entry: dict[str, Any]) -> RemoteFile | None:
    """None for the empty object that some tools make to stand for a folder."""
    key, begin = str(entry["Key"]), place.key("")
    name = key.removeprefix(begin)
    if key == begin:
        return None
    if not key.startswith(begin) or not is_folder_name(name):
        raise AdapterInvalid(f"the adapter has an object with a name that is not allowed: {shown(name)}")
    return RemoteFile(name, int(entry["Size"]), etag=str(entry["ETag"]))


def _digest(files: tuple[RemoteFile, ...]) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for file in files:
        for word in (file.name, str(file.num_bytes), file.etag):
            digest.update(len(word).to_bytes(4, "little") + word.encode())
    return digest.hexdigest()


def _said(error: ClientError) -> tuple[str, int]:
    code = error.response.get("Error", {}).get("Code", "")
    return str(code), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _failed(place: _Place, reason: str) -> AdapterError:
    """What is wrong with the service or our credentials is for the operator."""
    logger.warning("S3 bucket %s: %s", shown(place.bucket), shown(reason))
    return out_of_reach(_WHERE)
