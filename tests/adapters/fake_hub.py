"""A hub of our own, for tests: the real one cannot be reached from where they run.

It answers the questions that the real client (`huggingface_hub`) asks, as that client wants them answered;
tests hold both against each other. Large files are on a second server, at signed addresses, as on the hub.
"""

import hashlib
import json
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from tests.adapters.faulty_http import FaultyServer, Seen

LARGE = ".safetensors"
SIGNATURE = "cdn-signature-nobody-may-see"


def sha_of(word: str) -> str:
    """A commit's name."""
    return hashlib.sha1(word.encode()).hexdigest()


@dataclass
class Repository:
    """What the hub holds under one name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    readers: set[str] | None = None  # tokens that may read; None: everybody
    is_gated: bool = False  # everybody sees it, only readers get files
    sizes: dict[str, int] = field(default_factory=dict)  # lies

    def commit(self, files: dict[str, bytes], *, ref: str = "main") -> str:
        sha = sha_of(f"{ref} {len(self.commits)} {sorted(files)}")
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha


class FakeCdn(FaultyServer):
    """Files by their sha256, for who brings the signature. Knows ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.knows_ranges = True

    def answer(self, request: Seen, body: bytes) -> tuple[int, dict[str, str], bytes]:
        address = urlsplit(request.path)
        if parse_qs(address.query).get("Signature") != [SIGNATURE]:
            return 403, {}, b"no signature"
        content = self.files[address.path.rpartition("/")[2]]
        wanted = request.headers.get("range")
        if wanted is None or not self.knows_ranges:
            return 200, {"Accept-Ranges": "bytes"}, content
        begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        return 206, {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}, content[begin:]


class FakeHub(FaultyServer):
    """The routes that reading a model repository needs."""

    def __init__(self, cdn: FakeCdn) -> None:
        super().__init__()
        self.cdn = cdn
        self.repositories: dict[str, Repository] = {}
        self.moved: dict[str, str] = {}
        self.tokens = {"token-of-reader", "token-of-stranger", "token-of-server"}

    def answer(self, request: Seen, body: bytes) -> tuple[int, dict[str, str], bytes]:
        path = urlsplit(request.path).path
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name = "/".join(parts[:2])
        if name in self.moved:
            return 307, {"Location": request.path.replace(name, self.moved[name])}, b""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
        repository = self.repositories.get(name)
        may_read = repository is not None and (repository.readers is None or token in repository.readers)
        if repository is None or not (may_read or repository.is_gated):
            return (404 if token else 401), {"X-Error-Code": "RepoNotFound"}, b"{}"
        revision = unquote(parts[3]) if len(parts) > 3 else "main"
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if is_api and parts[2:3] == ["tree"]:
            return self._tree(repository, sha)
        if is_api:
            return self._describe(name, repository, sha, parse_qs(urlsplit(request.path).query))
        if not may_read:
            return (403 if token else 401), {"X-Error-Code": "GatedRepo"}, b"{}"
        return self._file(repository, sha, "/".join(parts[4:]))

    def _describe(
        self, name: str, repository: Repository, sha: str, query: dict[str, list[str]]
    ) -> tuple[int, dict[str, str], bytes]:
        siblings = []
        for path, content in repository.commits[sha].items():
            sibling: dict[str, object] = {"rfilename": path}
            if query.get("blobs", [""])[0].lower() == "true":
                size = repository.sizes.get(path, len(content))
                sibling |= {"size": size, "blobId": git_name(content)}
                if path.endswith(LARGE):
                    digest = hashlib.sha256(content).hexdigest()
                    sibling["lfs"] = {"sha256": digest, "size": size, "pointerSize": 130}
            siblings.append(sibling)
        answer = {"id": name, "modelId": name, "sha": sha, "private": False, "siblings": siblings}
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def _tree(self, repository: Repository, sha: str) -> tuple[int, dict[str, str], bytes]:
        """Only the library asks for this, when it downloads all of a repository."""
        answer: list[dict[str, object]] = []
        for path, content in repository.commits[sha].items():
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(content)}
            entry["oid"] = git_name(content)
            if path.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            answer.append(entry)
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def _file(self, repository: Repository, sha: str, path: str) -> tuple[int, dict[str, str], bytes]:
        content = repository.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if content is None:
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b"{}"
        if not path.endswith(LARGE):
            return 200, headers | {"ETag": f'"{git_name(content)}"'}, content
        digest = hashlib.sha256(content).hexdigest()
        self.cdn.files[digest] = content
        headers |= {
            "Location": f"http://localhost:{self.cdn.port}/repos/{digest}?Signature={SIGNATURE}",
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{digest}"',
        }
        return 302, headers, b""


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
