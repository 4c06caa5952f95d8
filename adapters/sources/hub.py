"""Adapters on a Hugging Face hub: `org/name` or `org/name@revision`, a branch, a tag or a commit.

The version is the commit. For every request the hub is asked, with the request's own token, for the head of
the adapter's config file, because that answer tells the commit and obeys gates as a download does; what the
hub says of a repository does not. A request without a token is nobody: the server's own token is used only
where the operator said so.

Offline (`HF_HUB_OFFLINE=1`) nothing is asked: what was fetched before, or lies in the hub library's own
cache, is served to whoever names it, and tokens are not looked at.

Bytes come by plain HTTP through `Downloader` and not through the library's download functions: these have
no end to time or bytes, write addresses with signatures into logs, and ask the hub for more than files.
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from adapters.errors import AdapterError, AdapterInvalid
from adapters.sources.cache import VersionCache, cache_key
from adapters.sources.download import Downloader, Refused
from adapters.sources.files import ADAPTER_FILES
from adapters.sources.limits import Checksum, Deadline, FetchLimits, RemoteFile, select_files
from adapters.sources.local import LocalSource
from adapters.sources.remote import no_such_adapter, out_of_reach
from adapters.spec import CONFIG_FILE

_ANSWER_S = 10.0  # for the question that every request asks
_MAX_INFO_BYTES = 2 * 2**20  # 5000 files; parsing this much holds the interpreter lock for some 20 ms
_DEFAULT_REVISION = "main"
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+/-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[!-~]{1,1024}")
_WHERE = "the hub"
_NO_ACCESS = (401, 403, 404)


@dataclass(frozen=True, slots=True)
class _Place:
    """A location in its two parts."""

    repository: str
    revision: str

    @classmethod
    def parse(cls, location: str) -> "_Place | None":
        repository, at, revision = location.partition("@")
        if not at:
            revision = _DEFAULT_REVISION
        if repository.count("/") != 1 or not repository.isascii():
            return None
        if not _REVISION.fullmatch(revision) or any(part in ("", ".", "..") for part in revision.split("/")):
            return None
        try:
            hf_hub_url(repository, CONFIG_FILE)
        except HFValidationError:
            return None
        return cls(repository, revision)


class HubSource:
    """A `RemoteSource`. From any thread."""

    name = "hub"

    def __init__(
        self,
        cache: VersionCache,
        limits: FetchLimits,
        *,
        endpoint: str,
        own_token: Callable[[], str | None] | None = None,
        is_offline: bool = False,
        library_cache: Path | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """`own_token`: for requests that bring none. `library_cache`: where the hub's library keeps files.

        `wait` gets the seconds between two attempts.
        """
        self._cache = cache
        self._limits = limits
        self._endpoint = endpoint
        self._own_token = own_token
        self._is_offline = is_offline
        self._library_cache = library_cache
        self._http = Downloader(_WHERE, wait)
        self._fetched = LocalSource((cache.root,), None)

    def accepts(self, location: str) -> bool:
        return _Place.parse(location) is not None

    def close(self) -> None:
        self._http.close()

    def resolve(self, location: str, token: str | None) -> str:
        """The commit. See `RemoteSource`."""
        place = _parsed(location)
        if self._is_offline:
            return self._resolve_offline(location, place)
        url = hf_hub_url(place.repository, CONFIG_FILE, revision=place.revision, endpoint=self._endpoint)
        try:
            headers = self._http.head(url, self._headers(token), self._http.deadline(_ANSWER_S))
        except Refused as error:
            refusal = _refusal(error, location)
        else:
            commit = headers.get("X-Repo-Commit", "")
            if _COMMIT.fullmatch(commit):
                return commit
            refusal = out_of_reach(_WHERE)
        raise refusal

    def fetch(self, location: str, version: str, token: str | None) -> Path:
        """The files of a commit. See `RemoteSource`."""
        place = _parsed(location)
        key = cache_key(self.name, self._endpoint, place.repository, version)
        deadline = self._http.deadline(self._limits.seconds)
        folder = self._cache.get(key)
        if folder is None:
            if self._is_offline:
                folder = self._copy(location, place, version, key, deadline)
            else:
                folder = self._download(location, place, version, key, token, deadline)
        self._cache.note(self._about(place), key, version)
        return self._fetched.check_path(folder)

    # --- Online -------------------------------------------------------------------------------------------

    def _download(
        self, location: str, place: _Place, commit: str, key: str, token: str | None, deadline: Deadline
    ) -> Path:
        headers = self._headers(token)
        try:
            files = self._list(place, commit, headers, deadline)
            chosen = select_files(files, self._limits)

            def fill(folder: Path) -> None:
                for file in chosen:
                    url = hf_hub_url(place.repository, file.name, revision=commit, endpoint=self._endpoint)
                    self._http.save(url, headers, file, folder / file.name, deadline)

            return self._cache.obtain(key, sum(file.num_bytes for file in chosen), deadline, fill)
        except Refused as error:
            refusal = _refusal(error, location)
        raise refusal

    def _list(
        self, place: _Place, commit: str, headers: dict[str, str], deadline: Deadline
    ) -> list[RemoteFile]:
        """All files of a commit, with what the hub says of their sizes and hashes."""
        url = f"{self._endpoint}/api/models/{place.repository}/revision/{quote(commit, safe='')}?blobs=true"
        body = self._http.read(url, headers, _MAX_INFO_BYTES, deadline)
        try:
            return [_described(one) for one in json.loads(body)["siblings"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise out_of_reach(_WHERE)

    def _headers(self, token: str | None) -> dict[str, str]:
        if not token and self._own_token is not None:
            token = self._own_token()
        if not token:
            return {}
        if not _TOKEN.fullmatch(token):
            raise AdapterInvalid("the token that came with the request is none that the hub could have given")
        return {"Authorization": f"Bearer {token}"}

    # --- Offline ------------------------------------------------------------------------------------------

    def _resolve_offline(self, location: str, place: _Place) -> str:
        if _COMMIT.fullmatch(place.revision):
            return place.revision
        commit = self._cache.noted(self._about(place))
        if commit is None:
            known = self._in_library_cache(place.repository, CONFIG_FILE, place.revision)
            if known is None:
                raise no_such_adapter(location)
            commit = known.parent.name
        return commit

    def _copy(self, location: str, place: _Place, commit: str, key: str, deadline: Deadline) -> Path:
        """Take the files out of the library's cache, which others write and which holds links."""
        known = {name: self._in_library_cache(place.repository, name, commit) for name in ADAPTER_FILES}
        found = {name: path for name, path in known.items() if path is not None}
        if CONFIG_FILE not in found:
            raise no_such_adapter(location)
        files = select_files(
            [RemoteFile(name, path.stat().st_size) for name, path in found.items()], self._limits
        )

        def fill(folder: Path) -> None:
            for file in files:
                deadline.left()
                shutil.copyfile(found[file.name], folder / file.name)

        return self._cache.obtain(key, sum(file.num_bytes for file in files), deadline, fill)

    def _in_library_cache(self, repository: str, name: str, revision: str) -> Path | None:
        if self._library_cache is None:
            return None
        path = try_to_load_from_cache(repository, name, cache_dir=self._library_cache, revision=revision)
        if not isinstance(path, str):
            return None
        is_inside = Path(path).resolve().is_relative_to(self._library_cache.resolve())
        return Path(path) if is_inside else None

    def _about(self, place: _Place) -> str:
        return cache_key(self.name, self._endpoint, place.repository, "at", place.revision)


def _parsed(location: str) -> _Place:
    place = _Place.parse(location)
    if place is None:
        raise no_such_adapter(location)
    return place


def _refusal(error: Refused, location: str) -> AdapterError:
    if error.code == "EntryNotFound":  # said only of what the token shows
        return AdapterInvalid(f"the adapter has no {CONFIG_FILE}")
    if error.status in _NO_ACCESS:
        return no_such_adapter(location)
    return out_of_reach(_WHERE, retry_after_s=error.retry_after_s)


def _described(sibling: dict[str, object]) -> RemoteFile:
    """Raises ValueError, KeyError or TypeError for what the hub never says."""
    name, size, large, blob = (sibling.get(word) for word in ("rfilename", "size", "lfs", "blobId"))
    if not isinstance(name, str) or type(size) is not int or size < 0:
        raise ValueError("a file without a name or a size")
    if isinstance(large, dict):
        return RemoteFile(name, size, Checksum("sha256", str(large["sha256"])))
    return RemoteFile(name, size, Checksum("git", blob) if isinstance(blob, str) else None)
