"""The file of API keys: what it says, and that changes count without a restart."""

import asyncio
import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.api import keys
from server.api.caller import Caller
from server.api.keys import KeyRing, KeysError, parse_keys
from tests.server.api.raw_http import until


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def only(text: str) -> Caller:
    (key,) = parse_keys(text)
    return key.caller


def test_key_alone_may_use_everything_and_change_nothing() -> None:
    caller = only("sk-1\n")

    assert caller.may_use(None)
    assert caller.may_use("any/adapter")
    assert not caller.is_admin
    assert not caller.is_limited
    assert caller.name is None


def test_options_follow_the_key_in_any_order() -> None:
    caller = only("sk-1\tadmin=yes  adapters=pirate,team-b/*,v?  base=no name=bob@b.org # Bob's\n")

    assert (caller.name, caller.is_admin, caller.is_limited) == ("bob@b.org", True, True)
    assert [caller.may_use(name) for name in ("pirate", "team-b/x/y", "v1")] == [True] * 3
    assert [caller.may_use(name) for name in (None, "pirates", "team-b", "v12", "Pirate", "")] == [False] * 6


@pytest.mark.parametrize(("value", "may_use"), [("*", True), ("a,*", True), ("", False), (",", False)])
def test_adapters_may_be_all_or_none(value: str, may_use: bool) -> None:
    assert only(f"sk-1 adapters={value}\n").may_use("pirate") is may_use


def test_comments_blank_lines_and_line_ends_of_other_systems_are_passed_over() -> None:
    found = parse_keys("# keys\r\n\r\nsk-1 name=a\r\n   # more\r\n  sk-2 name=b\r\n")

    assert [key.caller.name for key in found] == ["a", "b"]


def test_digest_stands_for_its_key_and_is_no_key_itself() -> None:
    written, hashed = only("sk-1\n"), only(f"sha256:{sha256('sk-1').upper()}\n")

    assert written == hashed
    assert parse_keys("sk-1\n")[0].sha256.hex() == sha256("sk-1")
    assert len(written.digest) == 32
    assert written.digest not in (sha256("sk-1"), sha256("sk-1")[:32])
    assert only("sk-2\n").digest != written.digest


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no key"),
        ("# only words\n", "no key"),
        ("sk-1\nsk-secret name=a", "does not end"),
        ("sk-1\nsk-secret nickname=hidden\n", "line 2: after the key"),
        ("sk-secret hidden\n", "line 1: after the key"),
        ("sk-secret name=hidden!\n", "line 1: name="),
        ("sk-secret name=\n", "line 1: name="),
        ("sk-secret name=" + "x" * 65 + "\n", "line 1: name="),
        ("sk-secret base=hidden\n", "line 1: base= takes yes or no"),
        ("sk-secret admin=True\n", "line 1: admin= takes yes or no"),
        ("sk-secret base=no base=yes\n", "line 1: base= is there twice"),
        ("sha256:hidden\n", "line 1: sha256:"),
        ("sha256:" + "0" * 63 + "\n", "line 1: sha256:"),
        (f"sk-secret\n\nsha256:{sha256('sk-secret')} name=hidden\n", "line 3 has the key of line 1"),
        ("".join(f"sk-{i}\n" for i in range(4097)), "more than 4096"),
    ],
)
def test_mistakes_are_named_without_what_the_file_holds(text: str, says: str) -> None:
    with pytest.raises(KeysError) as caught:
        parse_keys(text)

    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Ring:
    """A ring over a file, and what it says about a key."""

    def __init__(self, file: Path, api_key: str | None = None) -> None:
        self.file, self.clock = file, Clock()
        self.ring = KeyRing(api_key, file, self.clock)

    def write(self, text: str) -> None:
        self.file.write_text(text)

    def spoil(self, how: str) -> None:
        """Put something in the file's place that cannot be used."""
        self.file.unlink()
        if how == "half":
            self.file.write_text("sk-1 name=changed\nsk-secret nam")
        elif how == "empty":
            self.file.touch()
        elif how == "binary":
            self.file.write_bytes(b"sk-secret \xff\n")
        elif how == "folder":
            self.file.mkdir()
        elif how == "large":
            self.file.write_bytes(b"sk-secret\n" * 200_000)

    def mend(self, text: str) -> None:
        if self.file.is_dir():
            self.file.rmdir()
        self.write(text)

    async def name_of(self, key: str, *, after_s: float = 1.0) -> str | None:
        """The name that the key has so much later; "-" for none, None for a key that is not in force."""
        self.clock.now += after_s
        caller = await self.ring.find([key.encode()])
        return None if caller is None else caller.name or "-"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("sk-1 name=one\nsk-2 name=two\n")
    return path


async def test_keys_of_the_file_and_the_single_one_are_in_force_together(file: Path) -> None:
    ring = Ring(file, api_key="sk-0")

    assert [await ring.name_of(key) for key in ("sk-0", "sk-1", "sk-2")] == ["-", "one", "two"]
    for wrong in ("", "sk-", "sk-3", "sk-11", sha256("sk-1"), f"sha256:{sha256('sk-1')}"):
        assert await ring.name_of(wrong) is None


async def test_first_of_several_keys_counts(file: Path) -> None:
    ring = KeyRing(None, file, Clock())

    caller = await ring.find([b"wrong", b"sk-2", b"sk-1"])

    assert caller is not None
    assert caller.name == "two"


async def test_single_key_stays_an_admin_if_the_file_holds_it_too(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-1 name=one base=no\n")
    caller = await KeyRing("sk-1", tmp_path / "keys", Clock()).find([b"sk-1"])

    assert caller is not None
    assert caller.is_admin


async def test_change_counts_for_the_first_request_a_second_later(file: Path) -> None:
    ring = Ring(file)
    ring.write("sk-2 name=zwei\nsk-3 name=three\n")

    assert await ring.name_of("sk-1", after_s=0.9) == "one"
    assert await ring.name_of("sk-1", after_s=0.1) is None
    assert [await ring.name_of(key) for key in ("sk-2", "sk-3")] == ["zwei", "three"]


async def test_file_may_be_replaced_as_editors_and_mounted_secrets_do(file: Path, tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v2").mkdir()
    (tmp_path / "v1" / "keys").write_text("sk-1 name=old\n")
    (tmp_path / "v2" / "keys").write_text("sk-1 name=new\n")
    (tmp_path / "data").symlink_to("v1")
    ring = Ring(tmp_path / "data" / "keys")
    assert await ring.name_of("sk-1") == "old"

    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").rename(tmp_path / "data")

    assert await ring.name_of("sk-1") == "new"


@pytest.mark.parametrize("how", ["gone", "half", "empty", "binary", "folder", "large"])
async def test_broken_file_leaves_the_old_keys_and_one_line_without_content(
    file: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    ring = Ring(file)
    ring.spoil(how)
    with caplog.at_level(logging.INFO, "motet"):
        for _ in range(3):
            assert await ring.name_of("sk-1") == "one"
    (line,) = caplog.messages
    assert "the old keys stay" in line
    assert "sk-" not in line
    ring.mend("sk-1 name=mended\n")

    assert await ring.name_of("sk-1") == "mended"


async def test_keys_never_reach_the_log(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = Ring(file)
    with caplog.at_level(logging.DEBUG, "motet"):
        for text in ("sk-secret-3 name=x\n", "sk-secret-4 oops\n", "sk-secret-5 name=y\n"):
            ring.write(text)
            await ring.name_of("sk-secret-3")

    assert len(caplog.messages) == 3
    assert "sk-secret" not in caplog.text


async def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-1 name=one\n", "utf-8-sig")

    assert await Ring(tmp_path / "keys").name_of("sk-1") == "one"


@pytest.mark.parametrize("text", ["", "sk-1", "sk-1 oops\n"])
def test_file_that_is_broken_at_the_start_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)

    with pytest.raises(KeysError, match="keys: "):
        KeyRing(None, tmp_path / "keys", Clock())


class SlowFile:
    """File reads that wait for the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = threading.Event()
        self.num_reads = 0
        read = keys._read

        def slow(file: Path) -> bytes:
            self.num_reads += 1
            assert self.may_go_on.wait(10)
            return read(file)

        monkeypatch.setattr(keys, "_read", slow)


@pytest.fixture
def slow(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Ring, SlowFile]]:
    ring = Ring(file)
    slow = SlowFile(monkeypatch)
    yield ring, slow
    slow.may_go_on.set()


async def test_file_is_read_once_for_all_who_ask_at_the_same_time(slow: tuple[Ring, SlowFile]) -> None:
    ring, disk = slow
    ring.write("sk-1 name=new\n")
    asking = [asyncio.create_task(ring.name_of("sk-1", after_s=i == 0)) for i in range(5)]
    await asyncio.sleep(0)
    disk.may_go_on.set()

    assert await asyncio.gather(*asking) == ["new"] * 5
    assert disk.num_reads == 1


async def test_file_system_that_hangs_holds_requests_up_once_and_not_for_long(
    slow: tuple[Ring, SlowFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    ring, disk = slow
    monkeypatch.setattr(keys, "_PATIENCE_S", 0.01)

    assert [await ring.name_of("sk-1") for _ in range(3)] == ["one"] * 3
    await until(lambda: disk.num_reads > 0)  # its thread may begin late
    assert disk.num_reads == 1
    disk.may_go_on.set()
    assert await ring.name_of("sk-1") == "one"
