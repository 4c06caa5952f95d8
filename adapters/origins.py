"""Where a name's files are: asked before every load, because folders, links and remotes change.

An origin is asked in a pool; what it answers holds for one load. `root` is what an operator gave, and what
lists show; None where the name itself found the files.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from adapters.errors import AdapterInvalid, AdapterUnavailable
from adapters.signature import Signature
from adapters.sources.remote import RemoteSource
from adapters.uploads import was_uploaded

LOCAL = "local"
UPLOAD = "upload"
Sign = Callable[[Path], Signature]


class Source(Protocol):
    """Where the folders of adapters are found. All methods read the file system and run in a pool."""

    def find(self, name: str) -> Path | None:
        """The folder of the adapter of that name, or None. Raises AdapterError."""
        ...

    def check_path(self, path: str) -> Path:
        """The folder at a path that a client chose. Raises AdapterError if it is not there or not allowed."""
        ...

    def names(self) -> tuple[str, ...]:
        """All names that `find` finds."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files are, and what they were as somebody looked."""

    folder: Path
    signature: Signature
    root: str
    source: str


class Origin(Protocol):
    """Knows where the files of one adapter are."""

    @property
    def root(self) -> str | None: ...
    @property
    def is_remote(self) -> bool:
        """Whether asking may take as long as a download."""
        ...

    def locate(self) -> Place | None:
        """None: there is nothing by that name. Raises AdapterError."""
        ...


@dataclass(frozen=True, slots=True)
class SubFolder:
    """The sub-folder of --adapters-dir that is called like the adapter."""

    source: Source
    name: str
    sign: Sign
    root: None = None
    is_remote: bool = False

    def locate(self) -> Place | None:
        folder = self.source.find(self.name)
        if folder is None:
            return None
        return look_at(folder, self.sign, str(folder), UPLOAD if was_uploaded(folder) else LOCAL)


@dataclass(frozen=True, slots=True)
class ChosenPath:
    """A path that an operator sent; checked each time."""

    source: Source
    root: str
    sign: Sign
    label: str = LOCAL
    is_remote: bool = False

    def locate(self) -> Place | None:
        return look_at(self.source.check_path(self.root), self.sign, self.root, self.label)


@dataclass(frozen=True, slots=True)
class OwnFolder:
    """A folder of the command line, or of the server itself; it may be anywhere."""

    folder: Path
    sign: Sign
    label: str = LOCAL
    is_remote: bool = False

    @property
    def root(self) -> str:
        return str(self.folder)

    def locate(self) -> Place | None:
        return look_at(self.folder, self.sign, self.root, self.label)


@dataclass(slots=True)
class RemotePlace:
    """A location that an operator sent, with the token for it."""

    remote: RemoteSource
    root: str
    sign: Sign
    token: str | None = field(repr=False, compare=False)
    is_remote: bool = True
    _version: str | None = field(default=None, compare=False)  # the last one that was there

    def locate(self) -> Place | None:
        """While the remote cannot be asked, what it said last holds: its files may still be here."""
        try:
            self._version = self.remote.resolve(self.root, self.token)
        except AdapterUnavailable:
            if self._version is None:
                raise
        folder = self.remote.fetch(self.root, self._version, self.token)
        return look_at(folder, self.sign, self.root, self.remote.name)


def look_at(folder: Path, sign: Sign, root: str, source: str) -> Place:
    """Raises AdapterInvalid."""
    try:
        return Place(folder, sign(folder), root, source)
    except OSError as error:
        raise AdapterInvalid("the adapter's folder cannot be read") from error
