"""Opening a stranger's file: a regular one, not larger than it may be, and without waiting for anything.

What has a file's name may be a pipe, a device or a folder; opening it must neither block nor do something.
"""

import os
import stat
from io import FileIO
from pathlib import Path

from adapters.errors import AdapterInvalid


def open_regular(path: Path, max_bytes: int | None = None) -> FileIO:
    """The file, unbuffered. Raises AdapterInvalid, naming it; FileNotFoundError if it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"{path.name} cannot be read") from error
    status = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = f"{path.name} is not a file"
    elif max_bytes is not None and status.st_size > max_bytes:
        problem = f"{path.name} is larger than {max_bytes} bytes"
    if problem is not None:
        os.close(descriptor)
        raise AdapterInvalid(problem)
    return FileIO(descriptor, "r")
