from pathlib import Path

import pytest
import torch

from tests.server.model_rig import Checkpoint
from tests.server.tiny_models import save_tiny


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests share the machine with others; two threads that wait for each other are slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The folder of a family's checkpoint, written once."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            save_tiny(family, folders[family])
        return folders[family]

    return folder_of
