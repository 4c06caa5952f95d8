"""Answers against files that hold every byte of them."""

from pathlib import Path

import pytest

from tests.server.api.raw_http import RawAnswer


def assert_on_file(answer: RawAnswer, file: Path) -> None:
    """A file that is missing is written, and the test fails so that somebody looks at it."""
    # One HTTP chunk is one event: shown by a line between them, as the frames themselves end in blank lines.
    seen = answer.head + b"--- chunk\n".join(answer.chunks)
    if not file.exists():
        file.write_bytes(seen)
        pytest.fail(f"{file.name} was written: read it, then run again")
    assert seen.decode() == file.read_bytes().decode()
