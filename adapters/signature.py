"""What an adapter's files were when somebody looked: so that files that did not change are not read again.

Two looks are equal if nothing was written in between. The time of the last change of an inode is part of
it: neither a copy that keeps modification times nor a recycled inode number can hide from that.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from adapters.sources.local import WEIGHTS_FILE
from adapters.spec import CONFIG_FILE

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a folder may hold beside the weights that changes how an adapter answers."""

_SIGNED = (CONFIG_FILE, WEIGHTS_FILE, *TEXT_FILES)


@dataclass(frozen=True, slots=True)
class Signature:
    """One look."""

    folder: str  # links followed
    files: tuple[object, ...]  # only good for comparing


def sign(folder: Path) -> Signature:
    """Of the folder's files, links followed. A few system calls; raises OSError if the file system fails."""
    files = tuple(_sign_file(os.path.join(folder, name)) for name in _SIGNED)
    return Signature(os.path.realpath(folder), files)


def _sign_file(path: str) -> tuple[int, int, int, int] | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
