"""What every test of this folder gets."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.adapters.making import Folder, small_folder
from tests.adapters.stage import Stage


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The machine is shared, and results must not depend on how work was split, or on the tests before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return small_folder(tmp_path / "adapter")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """The files of a valid adapter, by name."""
    folder = small_folder(tmp_path / "made").path
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def stage(pool: ThreadPoolExecutor) -> Iterator[Stage]:
    """A registry over made-up files, with its books in order at the end."""
    stage = Stage(pool)
    yield stage
    stage.registry.check()
