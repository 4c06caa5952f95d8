"""Downloaded adapters on disk: whole versions or none, and never more bytes than allowed.

    obtain(key) ── there ──────────────────────────────────────────────────────────────> versions/KEY
                 └─ else ──> room made ──> partial/KEY-BYTES filled ──> synced, renamed ──┘

A version appears by one rename, so that neither a crash nor a full disk leaves half of one. The folder is
ours alone; several servers may share it. Each change is made under one lock, and whoever fills a version
holds a lock of that version, so that others wait for it, and can tell what a crashed server left behind.
The version that was asked for longest ago goes first; one that was asked for a moment ago stays, because
somebody is about to read it.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from adapters.errors import AdapterTooLarge, AdapterUnavailable
from adapters.sources.limits import Deadline

logger = logging.getLogger(__name__)

_KEEP_S = 60.0  # that a version stays after it was asked for: reading it begins within that time
_LOCK_S = 30.0  # that a change of others may take; it takes milliseconds, unless their server was stopped
_LOOK_AGAIN_S = 0.5  # who waits for another server to fetch a version notices that we shut down
_DIGEST_BYTES = 20
_STRIPE_CHARS = 3  # of a key: so many versions share a lock file that there are never more than 4096 of them


def cache_key(*parts: str) -> str:
    """A file name for what these words identify together."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        word = part.encode("utf-8", "surrogatepass")
        digest.update(len(word).to_bytes(4, "little") + word)
    return digest.hexdigest()


class VersionCache:
    """Reads and writes files, and waits for locks: call it from threads that may wait."""

    def __init__(self, root: Path, capacity_bytes: int, now: Callable[[], float] = time.time) -> None:
        """Makes the folder. `now`: unix time. Raises OSError if it cannot be written."""
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root = root.resolve()
        self._capacity_bytes = capacity_bytes
        self._now = now
        self._versions = self._folder("versions")
        self._partial = self._folder("partial")
        self._trash = self._folder("trash")
        self._locks = self._folder("locks")
        self._notes = self._folder("notes")

    def get(self, key: str) -> Path | None:
        """The version's folder, which now stays for a minute; None if it is not there."""
        with _disk(), self._lock():
            folder = self._versions / key
            try:
                os.utime(folder, (self._now(), self._now()))
            except FileNotFoundError:
                return None
            return folder

    def obtain(self, key: str, num_bytes: int, deadline: Deadline, fill: Callable[[Path], None]) -> Path:
        """The same, filled if need be: `fill` writes `num_bytes` into an empty folder.

        Raises AdapterTooLarge; AdapterUnavailable if there is no room now, on the disk or in the cache, or
        if somebody else is filling it longer than we may wait; and whatever `fill` raises.
        """
        with _disk(), self._filling(key, deadline):
            folder = self.get(key)
            if folder is not None:
                return folder
            partial = self._make_partial(key, num_bytes)
            try:
                fill(partial)
                _sync(partial)
                with self._lock():
                    folder = partial.rename(self._versions / key)
                    os.utime(folder, (self._now(), self._now()))
                return folder
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def note(self, about: str, key: str, text: str) -> None:
        """Keep a line that goes with a version, under a name of its own that `cache_key` made."""
        line = f"{key} {text}"
        with _disk(), self._lock():
            if self._line(about) != line:
                draft = self._trash / uuid4().hex
                draft.write_text(line, "utf-8")
                draft.rename(self._notes / about)

    def noted(self, about: str) -> str | None:
        """What was noted last, if the version that it goes with is still here."""
        with _disk(), self._lock():
            key, _, text = self._line(about).partition(" ")
            return text if key and (self._versions / key).is_dir() else None

    def _line(self, about: str) -> str:
        try:
            return (self._notes / about).read_text("utf-8")
        except FileNotFoundError:
            return ""

    # --- Room ---------------------------------------------------------------------------------------------

    def _make_partial(self, key: str, num_bytes: int) -> Path:
        """An empty folder to fill, and room for it. The caller holds the version's lock."""
        with self._lock():
            self._remove_abandoned(key)
            self._make_room(num_bytes)
            partial = self._partial / f"{key}-{num_bytes}"
            partial.mkdir()
            return partial

    def _remove_abandoned(self, key: str) -> None:
        """What a server that crashed had not finished: it holds no lock any more."""
        self._empty_trash()
        for partial in _folders(self._partial):
            if partial.name.startswith(f"{key}-"):
                shutil.rmtree(partial)
            elif partial.name[:_STRIPE_CHARS] != key[:_STRIPE_CHARS]:  # that lock is ours just now
                lock = self._lock_of(partial.name)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                try:
                    shutil.rmtree(partial)
                finally:
                    lock.release()

    def _make_room(self, num_bytes: int) -> None:
        """Evict until `num_bytes` are free; none if that would not be enough."""
        if num_bytes > self._capacity_bytes:
            raise AdapterTooLarge(
                f"the adapter's files have {num_bytes} bytes; all that is fetched may take"
                f" {self._capacity_bytes}"
            )
        filling = sum(int(partial.name.partition("-")[2]) for partial in _folders(self._partial))
        sizes = {folder: _num_bytes(folder) for folder in _folders(self._versions)}
        missing = filling + sum(sizes.values()) + num_bytes - self._capacity_bytes
        leaving = []
        for asked, folder in sorted((folder.stat().st_mtime, folder) for folder in sizes):
            if missing <= 0 or asked > self._now() - _KEEP_S:
                break
            leaving.append(folder)
            missing -= sizes[folder]
        if missing > 0:
            raise _not_now("all room for fetched adapters is in use; try again later", _KEEP_S)
        for folder in leaving:
            folder.rename(self._trash / uuid4().hex)  # at once, where removing takes several steps
        if leaving:
            self._forget_notes()
        self._empty_trash()

    def _forget_notes(self) -> None:
        for note in tuple(self._notes.iterdir()):
            if not (self._versions / self._line(note.name).partition(" ")[0]).is_dir():
                note.unlink()

    def _empty_trash(self) -> None:
        for rest in tuple(self._trash.iterdir()):
            if rest.is_dir():
                shutil.rmtree(rest)
            else:
                rest.unlink()

    # --- Locks --------------------------------------------------------------------------------------------

    @contextmanager
    def _filling(self, key: str, deadline: Deadline) -> Iterator[None]:
        lock = self._lock_of(key)
        is_ours = False
        while not is_ours:
            with suppress(Timeout):
                lock.acquire(timeout=min(_LOOK_AGAIN_S, deadline.left()))
                is_ours = True
        try:
            yield
        finally:
            lock.release()

    def _lock(self) -> FileLock:
        return FileLock(self._locks / "all", timeout=_LOCK_S)

    def _lock_of(self, key: str) -> FileLock:
        return FileLock(self._locks / key[:_STRIPE_CHARS])

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()]


def _num_bytes(folder: Path) -> int:
    return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder))


def _sync(folder: Path) -> None:
    """Let the disk have every byte before the rename does."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _disk() -> Iterator[None]:
    """What the disk refuses is for the operator; a client is told to come back."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        logger.error("the cache of adapters cannot be used: %s", reason)
        raise _not_now("fetched adapters cannot be stored now; try again later", _KEEP_S) from error


def _not_now(message: str, after_s: float) -> AdapterUnavailable:
    return AdapterUnavailable(message, retry_after_s=int(after_s))
