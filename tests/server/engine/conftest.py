from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint, written once.

    Imports are made here because most tests of this folder run without torch.
    """
    import torch

    from tests.server.tiny_models import save_tiny

    # Tests share the machine; two threads that wait for each other are slower than one.
    torch.set_num_threads(1)
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            save_tiny(family, folders[family])
        return folders[family]

    return folder_of
