"""Folders of uploaded adapters: whole or not there, and never anything else than what was sent."""

import os
from pathlib import Path

import pytest

from adapters.errors import AdapterInvalid
from adapters.uploads import UploadRoot, discard


@pytest.fixture
def root(tmp_path: Path) -> UploadRoot:
    return UploadRoot(tmp_path)


def staged(root: UploadRoot, content: str = "one") -> Path:
    folder = root.stage()
    (folder / "adapter_config.json").write_text(content)
    return folder


def content_of(root: UploadRoot, name: str) -> str:
    return (root.folder / name / "adapter_config.json").read_text()


def left_over(root: UploadRoot) -> list[str]:
    return sorted(path.name for path in root.folder.iterdir())


def test_a_staged_folder_is_hidden_and_a_published_one_has_its_name(root: UploadRoot) -> None:
    folder = staged(root)
    assert folder.name.startswith(".")
    root.publish(folder, "pirate").keep()
    assert left_over(root) == ["pirate"]
    assert root.find("pirate") == root.folder / "pirate"
    assert (root.folder / "pirate").stat().st_mode & 0o777 == 0o755


def test_publishing_again_replaces_and_leaves_nothing_behind(root: UploadRoot) -> None:
    for content in ("one", "two"):
        root.publish(staged(root, content), "pirate").keep()
    assert content_of(root, "pirate") == "two"
    assert left_over(root) == ["pirate"]


def test_rolling_back_restores_what_was_there_before(root: UploadRoot) -> None:
    root.publish(staged(root, "one"), "pirate").keep()
    root.publish(staged(root, "two"), "pirate").roll_back()
    assert content_of(root, "pirate") == "one"
    root.publish(staged(root, "three"), "sailor").roll_back()
    assert left_over(root) == ["pirate"]


def test_a_folder_that_was_not_sent_is_neither_replaced_nor_removed(root: UploadRoot) -> None:
    (root.folder / "own").mkdir()
    folder = staged(root)
    with pytest.raises(AdapterInvalid, match="operator"):
        root.publish(folder, "own")
    assert not root.remove("own")
    assert root.find("own") is None
    discard(folder)
    assert left_over(root) == ["own"]


def test_a_link_is_no_folder_that_was_sent(
    root: UploadRoot, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = UploadRoot(tmp_path_factory.mktemp("elsewhere"))
    elsewhere.publish(staged(elsewhere), "pirate").keep()
    (root.folder / "pirate").symlink_to(elsewhere.folder / "pirate")
    assert not root.remove("pirate")
    with pytest.raises(AdapterInvalid):
        root.publish(staged(root), "pirate")
    assert content_of(elsewhere, "pirate") == "one"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a\\b", "a\0b", "a\nb", "x" * 256])
def test_a_name_is_one_visible_folder_name(root: UploadRoot, name: str) -> None:
    folder = staged(root)
    with pytest.raises(AdapterInvalid):
        root.publish(folder, name)
    assert not root.remove(name)
    assert left_over(root) == [folder.name]


def test_what_was_sent_can_be_removed_once(root: UploadRoot) -> None:
    root.publish(staged(root), "pirate").keep()
    assert root.remove("pirate")
    assert not root.remove("pirate")
    assert left_over(root) == []


def test_only_what_was_abandoned_long_ago_is_swept(root: UploadRoot) -> None:
    old, young = staged(root), staged(root)
    (root.folder / "pirate").mkdir()
    for path in (old, root.folder / "pirate"):
        os.utime(path, (1000, 1000))
    root.sweep(now=young.stat().st_mtime + 60)
    assert left_over(root) == sorted([young.name, "pirate"])
    root.sweep(now=young.stat().st_mtime + 25 * 3600)
    assert left_over(root) == ["pirate"]


def test_a_folder_with_a_name_cannot_be_discarded(root: UploadRoot) -> None:
    (root.folder / "pirate").mkdir()
    with pytest.raises(AssertionError):
        discard(root.folder / "pirate")
