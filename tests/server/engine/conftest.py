import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests share the machine with others; two threads that wait for each other are slower than one."""
    torch.set_num_threads(1)
