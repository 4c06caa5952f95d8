"""Where adapters come from: a name or a path becomes a folder that may be read.

Names and paths come from clients. A name is one folder name below the adapters folder and nothing else; a
path must lie below one of the roots that the operator allowed, after all links have been followed, and so
must the files in it. A path outside the roots gets one answer, whether it exists or not.
"""

import os
from pathlib import Path

from adapters.errors import AdapterInvalid, AdapterNotFound
from adapters.names import shown
from adapters.spec import CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
_MAX_NAME_BYTES = 255  # what file systems allow
_MAX_PATH_BYTES = 4096
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class LocalSource:
    """Folders on this machine. Every method reads the file system: call them from a pool."""

    def __init__(self, roots: tuple[Path, ...], adapters_dir: Path | None) -> None:
        """`roots`: where paths may point to. `adapters_dir` is a root too, and the only place for names."""
        self._adapters_dir = None if adapters_dir is None else adapters_dir.resolve()
        resolved = [root.resolve() for root in roots]
        if self._adapters_dir is not None:
            resolved.append(self._adapters_dir)
        self._roots = tuple(dict.fromkeys(resolved))

    def find(self, name: str) -> Path | None:
        """The sub-folder of that name; None if there is none. Raises AdapterInvalid if it leads elsewhere."""
        if self._adapters_dir is None or not is_folder_name(name):
            return None
        folder = self._adapters_dir / name
        try:
            if not folder.is_dir():
                return None
        except OSError:
            return None
        return self._checked(folder)

    def names(self) -> tuple[str, ...]:
        """All sub-folders of the adapters folder, sorted. Hidden ones are not adapters."""
        if self._adapters_dir is None:
            return ()
        try:
            found = sorted(entry.name for entry in os.scandir(self._adapters_dir) if entry.is_dir())
        except OSError:
            return ()
        return tuple(name for name in found if is_folder_name(name) and not name.startswith("."))

    def check_path(self, path: str | Path) -> Path:
        """The folder that a client names by its path. Raises AdapterInvalid or AdapterNotFound."""
        text = os.fspath(path)
        if not text or "\0" in text or len(text.encode("utf-8", "surrogatepass")) > _MAX_PATH_BYTES:
            raise AdapterInvalid("that is not a path")
        try:
            folder = Path(text).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise AdapterInvalid("that is not a path") from error
        if not self._is_allowed(folder):
            raise AdapterInvalid(f"{shown(text)} is outside the folders that adapters may be loaded from")
        if not folder.is_dir():
            raise AdapterNotFound(f"{shown(text)} is not a folder")
        return self._checked(folder)

    def _checked(self, folder: Path) -> Path:
        """The folder with its links followed, if neither it nor its files lead out of the roots."""
        try:
            resolved = folder.resolve()
            inner = [(resolved / name).resolve() for name in (CONFIG_FILE, WEIGHTS_FILE)]
        except (OSError, RuntimeError) as error:
            raise AdapterInvalid(f"the folder of adapter {shown(folder.name)} cannot be read") from error
        if not all(self._is_allowed(one) for one in (resolved, *inner)):
            raise AdapterInvalid(
                f"adapter {shown(folder.name)} has a link that leads out of the allowed folders"
            )
        return resolved

    def _is_allowed(self, resolved: Path) -> bool:
        return any(resolved.is_relative_to(root) for root in self._roots)


def is_folder_name(name: str) -> bool:
    """Whether a client's name can be a folder's: one part, printable, no tricks."""
    return (
        bool(name)
        and name.isprintable()
        and name not in (".", "..")
        and not any(char in name for char in "/\\")
        and len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME_BYTES
    )


def refuse_pickles(folder: Path) -> None:
    """Raises AdapterInvalid if the adapter's weights are only there as a pickle, or not at all.

    A pickle beside a safetensors file (a trainer's optimizer state) is never opened and does no harm.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except (OSError, ValueError) as error:
        raise AdapterInvalid("the adapter's folder cannot be read") from error
    if WEIGHTS_FILE in names:
        return
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if pickles:
        raise AdapterInvalid(
            f"{shown(pickles[0])} is a pickle, which can run code when it is read;"
            f" save the adapter as {WEIGHTS_FILE}"
        )
    raise AdapterInvalid(f"the adapter has no {WEIGHTS_FILE}")
