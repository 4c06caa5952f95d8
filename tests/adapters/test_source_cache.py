"""Fetched versions on disk: whole or not there, within their bytes, whoever shares the folder."""

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import AdapterTooLarge, AdapterUnavailable
from adapters.sources.cache import VersionCache, cache_key
from adapters.sources.limits import Deadline
from tests.adapters.faulty_http import LIMIT_S

LATER_S = 61.0  # after this long, what was asked for may go
ROOT = Path(__file__).parents[2]


class Watched(Deadline):
    """Tells when somebody asks how long it may still wait: just before it does."""

    def __init__(self, closing: threading.Event | None = None) -> None:
        super().__init__(LIMIT_S, closing=closing)
        self.is_asked = threading.Event()

    def left(self) -> float:
        left = super().left()
        self.is_asked.set()
        return left


class Time:
    """Unix time, as a test wants it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


def cache_of(tmp_path: Path, time: Time, *, capacity: int = 100) -> VersionCache:
    return VersionCache(tmp_path / "cache", capacity, time)


def writing(num_bytes: int) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "file").write_bytes(b"x" * num_bytes)

    return fill


def never_called(_: Path) -> None:
    raise AssertionError("it is there")


def keep(cache: VersionCache, word: str, num_bytes: int) -> Path:
    return cache.obtain(cache_key(word), num_bytes, Deadline(LIMIT_S), writing(num_bytes))


def num_bytes_in(tmp_path: Path) -> int:
    """Of everything that is not a lock."""
    return sum(
        path.stat().st_size
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file() and path.parent.name != "locks"
    )


def test_what_was_kept_is_found_again(tmp_path: Path, time: Time) -> None:
    cache = cache_of(tmp_path, time)
    folder = keep(cache, "a", 10)

    assert (folder / "file").read_bytes() == b"x" * 10
    assert cache.get(cache_key("a")) == cache_of(tmp_path, time).get(cache_key("a")) == folder
    assert cache.get(cache_key("b")) is None


def test_keys_keep_their_parts_apart() -> None:
    assert cache_key("ab", "c") != cache_key("a", "bc") != cache_key("abc")
    assert cache_key("a/../b", "\ud800").isalnum()


def test_a_version_is_filled_once(tmp_path: Path, time: Time) -> None:
    cache = cache_of(tmp_path, time)
    folder = keep(cache, "a", 10)

    assert cache.obtain(cache_key("a"), 10, Deadline(LIMIT_S), never_called) == folder


def test_the_disk_has_every_byte_before_a_version_appears(
    tmp_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine that loses its power could show a version of empty files."""
    cache = cache_of(tmp_path, time)
    synced: set[int] = set()

    def noted(descriptor: int) -> None:
        assert cache.get(cache_key("a")) is None
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", noted)
    folder = keep(cache, "a", 10)

    assert synced == {folder.stat().st_ino, (folder / "file").stat().st_ino}


def test_what_fails_leaves_nothing(tmp_path: Path, time: Time) -> None:
    cache = cache_of(tmp_path, time)

    def half(folder: Path) -> None:
        writing(50)(folder)
        raise KeyError("the network")

    with pytest.raises(KeyError):
        cache.obtain(cache_key("a"), 100, Deadline(LIMIT_S), half)

    assert cache.get(cache_key("a")) is None
    assert num_bytes_in(tmp_path) == 0
    assert keep(cache, "a", 100)


def test_the_one_asked_for_longest_ago_goes_first(tmp_path: Path, time: Time) -> None:
    cache = cache_of(tmp_path, time)
    for word in "abc":
        keep(cache, word, 30)
        time.now += 1
    cache.get(cache_key("a"))
    time.now += LATER_S

    keep(cache, "d", 40)

    there = [word for word in "abcd" if (tmp_path / "cache" / "versions" / cache_key(word)).is_dir()]
    assert there == ["a", "c", "d"]
    assert num_bytes_in(tmp_path) == 100


def test_what_somebody_is_about_to_read_stays(tmp_path: Path, time: Time) -> None:
    cache = cache_of(tmp_path, time)
    keep(cache, "a", 60)
    time.now += LATER_S
    cache.get(cache_key("a"))

    with pytest.raises(AdapterUnavailable) as refusal:
        keep(cache, "b", 60)
    assert cache.get(cache_key("a")) is not None
    assert refusal.value.retry_after_s >= LATER_S - 1

    time.now += LATER_S
    assert keep(cache, "b", 60)


def test_nothing_is_evicted_in_vain(tmp_path: Path, time: Time) -> None:
    cache = cache_of(tmp_path, time)
    keep(cache, "a", 50)
    time.now += LATER_S
    keep(cache, "b", 50)

    with pytest.raises(AdapterTooLarge):
        keep(cache, "c", 101)
    with pytest.raises(AdapterUnavailable):
        keep(cache, "c", 60)
    assert cache.get(cache_key("a")) is not None


def test_bytes_that_others_are_about_to_write_count(tmp_path: Path, time: Time) -> None:
    cache, other = cache_of(tmp_path, time), cache_of(tmp_path, time)

    def while_another_asks(folder: Path) -> None:
        with pytest.raises(AdapterUnavailable):
            keep(other, "b", 50)
        keep(other, "c", 40)
        writing(60)(folder)

    cache.obtain(cache_key("a"), 60, Deadline(LIMIT_S), while_another_asks)
    assert num_bytes_in(tmp_path) == 100


def test_who_comes_second_waits_for_the_first(tmp_path: Path, time: Time) -> None:
    cache, other = cache_of(tmp_path, time), cache_of(tmp_path, time)
    is_filling, may_end = threading.Event(), threading.Event()
    found: list[Path] = []

    def slowly(folder: Path) -> None:
        is_filling.set()
        assert may_end.wait(LIMIT_S)
        writing(10)(folder)

    first = threading.Thread(
        target=lambda: found.append(cache.obtain(cache_key("a"), 10, Deadline(LIMIT_S), slowly))
    )
    deadline = Watched()
    second = threading.Thread(
        target=lambda: found.append(other.obtain(cache_key("a"), 10, deadline, never_called))
    )
    first.start()
    assert is_filling.wait(LIMIT_S)
    second.start()
    assert deadline.is_asked.wait(LIMIT_S)
    may_end.set()
    first.join()
    second.join()

    assert len(found) == 2
    assert found[0] == found[1]
    assert (found[0] / "file").stat().st_size == 10


def test_who_waits_for_another_server_notices_the_shutdown(tmp_path: Path, time: Time) -> None:
    cache, other = cache_of(tmp_path, time), cache_of(tmp_path, time)
    closing = threading.Event()
    deadline = Watched(closing)

    def while_another_asks(folder: Path) -> None:
        errors: list[AdapterUnavailable] = []

        def ask() -> None:
            try:
                other.obtain(cache_key("a"), 10, deadline, never_called)
            except AdapterUnavailable as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        assert deadline.is_asked.wait(LIMIT_S)
        closing.set()
        asking.join()
        assert [error.message for error in errors] == ["the server is shutting down"]
        writing(10)(folder)

    assert cache.obtain(cache_key("a"), 10, Deadline(LIMIT_S), while_another_asks)


def test_who_may_not_wait_any_longer_is_told_to_come_back(tmp_path: Path, time: Time) -> None:
    cache, other = cache_of(tmp_path, time), cache_of(tmp_path, time)

    def while_another_asks(folder: Path) -> None:
        errors: list[Exception] = []

        def ask() -> None:
            try:
                other.obtain(cache_key("a"), 10, Deadline(0.05), writing(10))
            except AdapterUnavailable as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        asking.join()
        assert len(errors) == 1
        writing(10)(folder)

    assert cache.obtain(cache_key("a"), 10, Deadline(LIMIT_S), while_another_asks)


CRASHING = """
import os, sys
from pathlib import Path
from adapters.sources.cache import VersionCache, cache_key
from adapters.sources.limits import Deadline

def die(folder):
    (folder / "file").write_bytes(b"x" * 30)
    os._exit(7)

VersionCache(Path(sys.argv[1]), 100).obtain(cache_key(sys.argv[2]), 60, Deadline(60), die)
"""


def crash(tmp_path: Path, word: str) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHING, str(tmp_path / "cache"), word], cwd=ROOT)
    assert done.returncode == 7


@pytest.mark.parametrize("word", ["a", "b"])
def test_what_a_crash_left_is_removed_and_does_not_count(tmp_path: Path, time: Time, word: str) -> None:
    """By whoever comes next, for the same version or another one."""
    crash(tmp_path, "a")
    assert num_bytes_in(tmp_path) == 30
    cache = cache_of(tmp_path, time)
    assert cache.get(cache_key("a")) is None

    assert (keep(cache, word, 100) / "file").stat().st_size == 100
    assert num_bytes_in(tmp_path) == 100


def test_a_full_disk_is_said_to_the_operator_and_leaves_nothing(
    tmp_path: Path, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the size of a file stands for the disk: the same call fails in the same way."""
    cache = cache_of(tmp_path, time, capacity=10**6)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(AdapterUnavailable, match="stored"):
            keep(cache, "a", 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert "File too large" in caplog.text
    assert num_bytes_in(tmp_path) == 0
    assert keep(cache, "a", 5000)


def test_a_folder_that_vanishes_is_an_error_for_the_operator(
    tmp_path: Path, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of(tmp_path, time)
    keep(cache, "a", 10)
    os.rename(tmp_path / "cache", tmp_path / "elsewhere")

    with pytest.raises(AdapterUnavailable):
        keep(cache, "b", 10)
    assert "cannot be used" in caplog.text


def test_the_folder_is_for_nobody_else(tmp_path: Path, time: Time) -> None:
    cache_of(tmp_path, time)

    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_others_files_are_left_alone(tmp_path: Path, time: Time) -> None:
    """Who points us at a folder with something in it loses nothing."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine").write_bytes(b"x" * 1000)
    cache = cache_of(tmp_path, time)
    for word in "abc":
        keep(cache, word, 100)
        time.now += LATER_S

    assert (tmp_path / "cache" / "mine").stat().st_size == 1000


def test_notes_go_with_their_version(tmp_path: Path, time: Time) -> None:
    cache = cache_of(tmp_path, time)
    keep(cache, "a", 60)
    cache.note(cache_key("branch"), cache_key("a"), "first")
    assert cache_of(tmp_path, time).noted(cache_key("branch")) == "first"
    cache.note(cache_key("branch"), cache_key("a"), "second")
    assert cache.noted(cache_key("branch")) == "second"
    assert cache.noted(cache_key("other")) is None
    time.now += LATER_S

    keep(cache, "b", 60)

    assert cache.noted(cache_key("branch")) is None
    assert not list((tmp_path / "cache" / "notes").iterdir())


def test_many_threads_and_few_bytes_never_exceed_the_room(tmp_path: Path, time: Time) -> None:
    cache = cache_of(tmp_path, time)
    seen: list[int] = []
    refused: list[str] = []

    def ask(words: str) -> None:
        for word in words:
            try:
                folder = keep(cache, word, 30)
            except AdapterUnavailable:
                refused.append(word)
                continue
            assert (folder / "file").read_bytes() == b"x" * 30
            seen.append(sum(path.stat().st_size for path in (tmp_path / "cache" / "versions").rglob("file")))

    threads = [threading.Thread(target=ask, args=(words,)) for words in ("abcd", "dcba", "bdac")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(seen) + len(refused) == 12
    assert max(seen) == 90
    assert refused
