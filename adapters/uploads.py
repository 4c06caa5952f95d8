"""Adapters that clients sent: a folder of folders, each with its name, none of them ever half there.

    stage ──> .motet-upload-ab12/ is filled and checked ──> publish ──> NAME/  (one rename)
                       └────────── discard ──> nothing          └── roll_back ──> as it was before

The folder is usually the one whose sub-folders are adapters anyway: what is put there is still there after a
restart, and other servers that share the folder see it as soon as it is whole. Folders that an operator has
put there are never replaced or removed: a mark in each folder tells what was sent.

Names come from clients. A name is one visible folder name and nothing else; what is written into a folder
has names of ours.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

from adapters.errors import AdapterInvalid
from adapters.names import shown
from adapters.sources.local import is_folder_name

_MARK = ".motet-upload"
_STAGED = ".motet-upload-"  # and letters
_BEFORE = "before"
_ABANDONED_S = 24 * 3600.0  # a server that shares the folder may still be filling a younger one
_FOLDER_MODE = 0o755


class UploadRoot:
    """All methods use the file system: call them from a pool, `publish` and `remove` one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def stage(self) -> Path:
        """A new folder to fill, which is no adapter yet. Raises OSError."""
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=self.folder))
        (staged / _MARK).write_text("sent to motet: DELETE /v1/adapters/NAME removes this folder\n")
        return staged

    def publish(self, staged: Path, name: str) -> "Published":
        """Make the staged folder the adapter of that name, instead of one that was sent before.

        Raises AdapterInvalid if the name cannot be a folder's, or is that of a folder that was not sent;
        OSError.
        """
        check_upload_name(name)
        place = self.folder / name
        aside: Path | None = None
        staged.chmod(_FOLDER_MODE)
        if os.path.lexists(place):
            if not was_uploaded(place):
                raise AdapterInvalid(
                    f"{shown(name)} is a folder that the operator of the server has put there"
                )
            aside = self._set_aside(place)
        try:
            staged.rename(place)
        except OSError:
            if aside is not None:
                (aside / _BEFORE).rename(place)
            raise
        return Published(place, aside)

    def find(self, name: str) -> Path | None:
        """The folder that was sent under this name."""
        folder = self.folder / name
        return folder if _is_upload_name(name) and was_uploaded(folder) else None

    def remove(self, name: str) -> bool:
        """Whether an adapter of that name had been sent; its folder is gone then. Raises OSError."""
        folder = self.find(name)
        if folder is None:
            return False
        discard(self._set_aside(folder))
        return True

    def sweep(self, now: float | None = None) -> None:
        """Remove what servers that were killed have left behind. `now`: unix time."""
        limit = (time.time() if now is None else now) - _ABANDONED_S
        for path in self.folder.glob(f"{_STAGED}*"):
            if path.is_dir() and not path.is_symlink() and path.stat().st_mtime < limit:
                discard(path)

    def _set_aside(self, place: Path) -> Path:
        """The folder that it is in now, where no name leads."""
        aside = Path(tempfile.mkdtemp(prefix=_STAGED, dir=self.folder))
        place.rename(aside / _BEFORE)
        return aside


class Published:
    """A folder that has just got its name, until it is certain that it keeps it."""

    def __init__(self, folder: Path, aside: Path | None) -> None:
        """`aside`: a folder with what had the name before in it."""
        self.folder = folder
        self._aside = aside

    def keep(self) -> None:
        """What had the name before is not needed any more."""
        if self._aside is not None:
            discard(self._aside)

    def roll_back(self) -> None:
        """As it was before. Raises OSError."""
        aside = self._aside or Path(tempfile.mkdtemp(prefix=_STAGED, dir=self.folder.parent))
        self.folder.rename(aside / "after")
        if self._aside is not None:
            (aside / _BEFORE).rename(self.folder)
        discard(aside)


def discard(folder: Path) -> None:
    """Remove a folder that is staged or set aside; what cannot be removed is left to a later sweep."""
    assert folder.name.startswith(_STAGED), "a folder that has a name is not ours to discard"
    shutil.rmtree(folder, ignore_errors=True)


def check_upload_name(name: str) -> None:
    """Raises AdapterInvalid for a name that cannot be a visible folder's."""
    if not _is_upload_name(name):
        raise AdapterInvalid(
            f"{shown(name)} cannot be the name of an uploaded adapter: it must be that of one folder"
        )


def _is_upload_name(name: str) -> bool:
    return is_folder_name(name) and not name.startswith(".")


def was_uploaded(folder: Path) -> bool:
    """Whether a client has sent it."""
    mark = folder / _MARK
    return not folder.is_symlink() and folder.is_dir() and mark.is_file() and not mark.is_symlink()
