"""Page-locked memory against a registrar that keeps the books the driver would keep."""

import gc
import mmap
from dataclasses import dataclass, field

import pytest
import torch

from adapters.host_memory import PageLocked, memory_for, ordinary
from adapters.weights import load_weights
from tests.adapters.making import Folder, small_targets

PAGE = mmap.PAGESIZE
CPU = torch.device("cpu")


@dataclass
class Books:
    """What is registered now, and how often anything was. Refuses like the driver what overlaps."""

    is_full: bool = False
    registered: dict[int, int] = field(default_factory=dict)
    num_calls: int = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.num_calls += 1
        overlaps = any(a < address + num_bytes and address < a + n for a, n in self.registered.items())
        if self.is_full or overlaps or address % PAGE or num_bytes % PAGE or flags != 1:
            return 2
        self.registered[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.num_calls += 1
        return 0 if self.registered.pop(address, None) else 2


def covers(books: Books, tensor: torch.Tensor) -> bool:
    return any(
        address <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= address + num_bytes
        for address, num_bytes in books.registered.items()
    )


def test_tensors_are_locked_in_pages_of_their_own() -> None:
    books = Books()
    memory = PageLocked(books, CPU)

    tensors = [memory.allocate(count, torch.bfloat16) for count in (1, 5000, PAGE // 2)]

    assert all(covers(books, tensor) for tensor in tensors)
    assert sorted(books.registered.values()) == [PAGE, PAGE, -(-10_000 // PAGE) * PAGE]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [float(tensor.float().mean()) for tensor in tensors] == [0.0, 1.0, 2.0]


def test_what_is_not_used_any_more_is_used_again_for_the_same_size() -> None:
    books = Books()
    memory = PageLocked(books, CPU)
    for number in range(20):
        memory.allocate(3000, torch.float32).fill_(number)

    assert books.num_calls == 1


def test_other_sizes_give_back_what_is_not_used_any_more() -> None:
    books = Books()
    memory = PageLocked(books, CPU)
    kept = memory.allocate(10, torch.float32)
    for number_of_pages in (1, 2, 3):
        memory.allocate(number_of_pages * PAGE // 4, torch.float32)

    assert sorted(books.registered.values()) == [PAGE, 3 * PAGE]
    assert covers(books, kept)


def test_a_view_keeps_the_pages_of_its_tensor() -> None:
    books = Books()
    memory = PageLocked(books, CPU)
    view = memory.allocate(PAGE, torch.uint8).fill_(7).narrow(0, 64, 64).view(8, 8)
    gc.collect()
    memory.allocate(PAGE, torch.uint8).fill_(0)

    assert view.eq(7).all()


def test_memory_that_cannot_be_locked_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    memory = PageLocked(Books(is_full=True), CPU)

    tensors = [memory.allocate(100, torch.float32).fill_(1) for _ in range(2)]
    del tensors[0]
    tensors.append(memory.allocate(100_000, torch.float32).fill_(1))

    assert all(tensor.eq(1).all() for tensor in tensors)
    assert len(caplog.records) == 1


def test_adapter_in_memory_that_was_another_ones_is_the_same_adapter(folder: Folder) -> None:
    """Also between the pieces, where nothing is written."""
    memory = PageLocked(books := Books(), CPU)
    plain = load_weights(folder.path, small_targets(), torch.bfloat16, 1 << 20)
    memory.allocate(plain.run.numel(), torch.bfloat16).fill_(torch.nan)

    locked = load_weights(folder.path, small_targets(), torch.bfloat16, 1 << 20, allocate=memory.allocate)

    assert books.num_calls == 1
    assert covers(books, locked.run)
    assert locked.revision == plain.revision
    assert torch.equal(locked.run, plain.run)


def test_host_copies_for_the_cpu_lie_in_ordinary_memory() -> None:
    assert memory_for(CPU) is ordinary


@pytest.mark.gpu
def test_driver_knows_what_was_locked_and_forgets_it() -> None:
    device = torch.device("cuda")
    memory = PageLocked(torch.cuda.cudart(), device)
    tensor = memory.allocate(3 * PAGE, torch.uint8).fill_(3)

    assert tensor.is_pinned()
    assert not ordinary(3 * PAGE, torch.uint8).is_pinned()
    del tensor
    again = memory.allocate(5 * PAGE, torch.uint8).fill_(5)
    assert again.is_pinned()
    assert torch.equal(again.to(device, non_blocking=True).cpu(), again)
