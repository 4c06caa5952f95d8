"""A real adapters folder: what is put there is served, what changes is swapped, what goes is forgotten."""

import asyncio
import logging
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from adapters.errors import AdapterInvalid
from adapters.reader import AdapterFiles
from adapters.registry import AdapterRegistry
from adapters.scan import AdaptersFolder
from adapters.signature import Signature, sign
from adapters.sources.local import LocalSource
from adapters.store import AdapterStore
from adapters.types import Outline
from adapters.watch import AdapterWatch
from adapters.weights import LoraWeights, load_weights, read_outline
from tests.adapters.fake_files import LIMIT_S
from tests.adapters.making import Folder, small_folder, small_targets, small_tensors

MAX_BYTES = 1 << 20


class Library:
    """An adapters folder, and a registry over it that counts what it reads."""

    def __init__(self, root: Path, pool: ThreadPoolExecutor, capacity_bytes: int = MAX_BYTES) -> None:
        self.root = root
        self.root.mkdir(exist_ok=True)
        self.outlined: Counter[str] = Counter()
        self.loaded: Counter[str] = Counter()
        self.unreadable: set[str] = set()  # names whose file system fails
        self.store: AdapterStore[LoraWeights] = AdapterStore(pool, capacity_bytes)
        source = LocalSource((), root)
        files = AdapterFiles(self._outline, self._load, sign=self._sign)
        self.registry = AdapterRegistry(self.store, source, files, pool, pool)
        self.folder = AdaptersFolder(root, source, self.registry, pool, sign=self._sign)

    def put(self, name: str, *, rank: int = 2, seed: int = 0) -> Folder:
        """Written elsewhere and renamed, as it should be."""
        made = small_folder(self.root.parent / "made" / name, rank=rank, seed=seed)
        there = self.root / name
        if there.exists():
            there.rename(self.root.parent / f"old-{name}-{seed}")
        made.path.rename(there)
        return Folder(there)

    def names(self) -> list[str]:
        return [info.ref.name for info in self.registry.list()]

    def revision(self, name: str) -> str | None:
        status = self.registry.status(name)
        assert status is not None
        return status.info.revision

    def is_loaded(self, name: str) -> bool:
        status = self.registry.status(name)
        return status is not None and status.is_loaded

    async def use(self, name: str) -> str:
        lease = await self.registry.acquire(name)
        lease.release()
        return lease.ref.revision

    def _outline(self, folder: Path) -> Outline:
        self.outlined[folder.name] += 1
        return read_outline(folder, small_targets(), torch.float32, MAX_BYTES)

    def _load(self, folder: Path) -> LoraWeights:
        self.loaded[folder.name] += 1
        return load_weights(folder, small_targets(), torch.float32, MAX_BYTES)

    def _sign(self, folder: Path) -> Signature:
        if folder.name in self.unreadable:
            raise OSError(5, "the server of the files does not answer")
        return sign(folder)


@pytest.fixture
def library(tmp_path: Path, pool: ThreadPoolExecutor) -> Library:
    return Library(tmp_path / "adapters", pool)


# --- Looking ------------------------------------------------------------------------------------------------


async def test_scan_registers_what_is_sound_and_says_what_is_not(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "broken", "c"):
        library.put(name)
    (library.root / "broken" / "adapter_model.safetensors").write_bytes(b"cut short")

    with caplog.at_level(logging.WARNING, "adapters"):
        await library.folder.scan()
        await library.folder.scan()

    assert library.names() == ["a", "c"]
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("adapter 'broken': left out: adapter_model.safetensors")
    assert str(library.root) not in caplog.text


async def test_what_failed_before_it_was_found_is_not_listed_for_its_outline(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    """Its header is sound; that its numbers are none was seen when somebody asked for it."""
    await library.folder.scan()
    tensors = {name: tensor * torch.nan for name, tensor in small_tensors().items()}
    library.put("bad").save(tensors)
    with pytest.raises(AdapterInvalid, match="NaN"):
        await library.use("bad")

    with caplog.at_level(logging.WARNING, "adapters"):
        await library.folder.scan()
        await library.folder.scan()

    assert library.names() == []
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("adapter 'bad': left out: tensor")
    library.put("bad", seed=1)
    await library.folder.scan()
    assert library.names() == ["bad"]


async def test_a_few_adapters_that_fit_are_loaded_at_once(library: Library) -> None:
    for seed, name in enumerate("ab"):
        library.put(name, seed=seed)

    await library.folder.scan()

    assert all(info.revision for info in library.registry.list())
    assert library.loaded == {"a": 1, "b": 1}
    assert library.store.total_pins() == 0


async def test_more_than_fits_is_listed_by_its_outline_and_read_by_nobody(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    library = Library(tmp_path / "adapters", pool, capacity_bytes=2000)
    for number in range(5):
        library.put(str(number), rank=1 + number % 2, seed=number)

    await library.folder.scan()

    assert library.loaded == {}
    before = {info.ref.name: (info.rank, info.targets, info.num_bytes) for info in library.registry.list()}
    for name in "01234":
        await library.use(name)
    after = {info.ref.name: (info.rank, info.targets, info.num_bytes) for info in library.registry.list()}
    assert after == before
    assert {rank for rank, *_ in after.values()} == {1, 2}


async def test_an_unchanged_folder_is_read_once(library: Library) -> None:
    library.put("a")
    for _ in range(3):
        await library.folder.scan()
        await library.use("a")

    assert (library.outlined["a"], library.loaded["a"]) == (1, 1)


async def test_a_folder_that_is_not_complete_is_ignored_until_it_is(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    await library.folder.scan()
    whole = small_folder(library.root.parent / "whole")
    content = whole.weights_path.read_bytes()
    there = library.root / "late"
    there.mkdir()
    for write in (
        lambda: None,
        lambda: shutil.copy(whole.config_path, there),
        lambda: (there / "adapter_model.safetensors").write_bytes(content[:100]),
        lambda: (there / "adapter_model.safetensors").write_bytes(content[:-1]),
    ):
        write()
        await library.folder.scan()
        assert library.names() == []
    assert caplog.records == []

    (there / "adapter_model.safetensors").write_bytes(content)
    await library.folder.scan()

    assert library.names() == ["late"]
    assert library.loaded == {}


async def test_a_folder_that_stays_incomplete_is_complained_about_once(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    await library.folder.scan()
    (library.root / "half").mkdir()
    for _ in range(4):
        await library.folder.scan()

    assert len(caplog.records) == 1
    assert "'half': left out" in caplog.text


async def test_changed_bytes_are_another_revision_and_the_old_one_is_freed(library: Library) -> None:
    library.put("a", seed=1)
    await library.folder.scan()
    running = await library.registry.acquire("a")
    library.put("a", seed=2)

    await library.folder.scan()

    fresh = await library.registry.acquire("a")
    assert fresh.ref.revision != running.ref.revision
    assert library.store.is_loaded(running.ref.revision)
    running.release()
    assert not library.store.is_loaded(running.ref.revision)
    fresh.release()


async def test_a_change_that_is_broken_leaves_the_old_revision(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    folder = library.put("a")
    await library.folder.scan()
    revision = await library.use("a")
    folder.save({name: tensor * float("nan") for name, tensor in small_tensors().items()})
    for _ in range(4):
        await library.folder.scan()

    assert await library.use("a") == revision
    status = library.registry.status("a")
    assert status is not None
    assert status.error is not None
    assert "NaN" in status.error
    assert library.loaded["a"] == 2, "broken bytes are read once"
    assert len(caplog.records) == 1

    folder.save(small_tensors(seed=5))
    await library.folder.scan()
    assert await library.use("a") != revision


async def test_a_removed_folder_goes_after_those_who_use_it(library: Library) -> None:
    library.put("a")
    await library.folder.scan()
    running = await library.registry.acquire("a")
    shutil.rmtree(library.root / "a")

    await library.folder.scan()

    assert library.names() == []
    assert library.store.is_loaded(running.ref.revision)
    running.release()
    assert library.store.num_bytes == 0


async def test_a_folder_that_is_emptied_and_filled_again_is_served_all_the_time(library: Library) -> None:
    folder = library.put("a")
    await library.folder.scan()
    first = await library.use("a")
    folder.weights_path.unlink()
    folder.config_path.unlink()
    await library.folder.scan()
    assert await library.use("a") == first

    small_folder(folder.path, seed=7)
    await library.folder.scan()

    assert await library.use("a") != first


async def test_an_unloaded_folder_does_not_come_back_by_itself(library: Library) -> None:
    library.put("a")
    await library.folder.scan()
    await library.registry.unload("a")
    await library.folder.scan()
    assert library.names() == []

    await library.use("a")
    assert library.names() == ["a"], "asked for"


async def test_a_link_that_is_swapped_is_a_change(library: Library) -> None:
    """As Kubernetes updates a mounted volume: names lead through ..data, which is renamed over."""
    for version in (1, 2):
        small_folder(library.root / f"..version-{version}" / "a", seed=version)
    (library.root / "..data").symlink_to("..version-1")
    (library.root / "a").symlink_to("..data/a")
    await library.folder.scan()
    first = await library.use("a")

    (library.root / "..new").symlink_to("..version-2")
    (library.root / "..new").rename(library.root / "..data")
    await library.folder.scan()

    assert library.names() == ["a"]
    assert await library.use("a") != first


async def test_a_file_system_that_fails_for_a_moment_takes_nothing_away(library: Library) -> None:
    for seed, name in enumerate("ab"):
        library.put(name, seed=seed)
    await library.folder.scan()
    library.unreadable = {"a"}
    await library.folder.scan()
    assert library.names() == ["a", "b"]

    library.root.rename(library.root.parent / "away")
    await library.folder.scan()

    assert library.names() == ["a", "b"]
    assert library.is_loaded("a")


# --- Watching -----------------------------------------------------------------------------------------------


class Seen:
    """How often a watch has scanned."""

    def __init__(self) -> None:
        self._scanned = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self) -> None:
        task = asyncio.create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._scanned:
            self._scanned.notify_all()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S), self._scanned:
            await self._scanned.wait_for(is_so)


@asynccontextmanager
async def watched(library: Library) -> AsyncIterator[Seen]:
    seen = Seen()
    with ThreadPoolExecutor(1) as thread:
        watch = AdapterWatch(library.folder, thread, on_scanned=seen)
        running = asyncio.create_task(watch.run())
        try:
            async with asyncio.timeout(LIMIT_S):
                await watch.has_scanned.wait()
            yield seen
        finally:
            running.cancel()
            await asyncio.wait((running,))
    assert running.cancelled()


async def test_what_happens_in_a_watched_folder_is_seen(library: Library) -> None:
    async with watched(library) as seen:
        library.put("a", seed=1)
        await seen.until(lambda: library.names() == ["a"])
        first = await library.use("a")

        library.put("a", seed=2)
        await seen.until(lambda: library.is_loaded("a") and library.registry.list()[0].revision != first)
        second = await library.use("a")
        assert second != first

        Folder(library.root / "a").save(small_tensors(seed=3))  # in place
        await seen.until(lambda: library.registry.list()[0].revision != second)

        shutil.rmtree(library.root / "a")
        await seen.until(lambda: library.names() == [])
    assert library.store.num_bytes == 0


async def test_events_find_a_change_long_before_the_timer(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.watch._SHORTEST_S", 10 * LIMIT_S)
    monkeypatch.setattr("adapters.watch._LONGEST_S", 10 * LIMIT_S)
    async with watched(library) as seen:
        library.put("a")
        await seen.until(lambda: library.names() == ["a"])


async def test_events_tell_what_changes_inside_one_of_many_folders(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.watch._SHORTEST_S", 10 * LIMIT_S)
    monkeypatch.setattr("adapters.watch._LONGEST_S", 10 * LIMIT_S)
    for number in range(64):
        library.put(f"a{number}")
    async with watched(library) as seen:
        await seen.until(lambda: len(library.names()) == 64)
        for seed in (101, 102):  # the first may be found by the look that follows the new watches
            before = await library.use("a63")
            Folder(library.root / "a63").save(small_tensors(seed=seed))  # in place
            await seen.until(lambda: library.revision("a63") != before)  # noqa: B023 - awaited at once


async def test_of_too_many_folders_the_timer_finds_what_changes_inside(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.watch._MAX_INNER", 1)
    monkeypatch.setattr("adapters.watch._SHORTEST_S", 0.01)
    for name in ("a", "b"):
        library.put(name)
    async with watched(library) as seen:
        await seen.until(lambda: library.names() == ["a", "b"])
        first = library.revision("a")
        Folder(library.root / "a").save(small_tensors(seed=3))  # in place
        await seen.until(lambda: library.revision("a") != first)


async def test_the_timer_finds_what_no_event_tells(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*folders: Path, **options: object) -> None:
        raise OSError(28, "no watches left")

    monkeypatch.setattr("adapters.watch.watch", refuse)
    monkeypatch.setattr("adapters.watch._SHORTEST_S", 0.01)
    async with watched(library) as seen:
        library.put("a")
        await seen.until(lambda: library.names() == ["a"])


async def test_a_link_to_a_large_tree_is_not_followed(library: Library) -> None:
    """It would keep everything from running while the kernel is asked to watch all of it."""
    os.symlink("/", library.root / "everything")
    async with watched(library) as seen:
        library.put("a")
        await seen.until(lambda: library.names() == ["a"])
