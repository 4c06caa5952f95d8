"""Names and paths of clients reach only what the operator allowed."""

from pathlib import Path

import pytest

from adapters.errors import AdapterInvalid, AdapterNotFound
from adapters.sources.local import LocalSource, is_folder_name, refuse_pickles
from tests.adapters.making import Folder, small_folder

TRICKS = (
    "",
    ".",
    "..",
    "../secret",
    "a/../../secret",
    "/etc/passwd",
    "sub/a",
    "..\\secret",
    "a\0b",
    "a\nb",
    "x" * 300,
    "\ud800",
    "é" * 200,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """adapters/a is an adapter, secret is one outside."""
    small_folder(tmp_path / "secret")
    small_folder(tmp_path / "adapters" / "a")
    return tmp_path / "adapters"


def test_name_is_a_sub_folder(root: Path) -> None:
    source = LocalSource((), root)

    assert source.find("a") == root / "a"
    assert source.find("b") is None
    assert source.names() == ("a",)


@pytest.mark.parametrize("name", TRICKS, ids=ascii)
def test_names_with_tricks_are_unknown(root: Path, name: str) -> None:
    assert LocalSource((), root).find(name) is None
    assert not is_folder_name(name)


def test_files_and_hidden_folders_are_not_listed(root: Path) -> None:
    (root / "readme.txt").write_text("")
    (root / ".cache").mkdir()

    assert LocalSource((), root).names() == ("a",)
    assert LocalSource((), root).find("readme.txt") is None


def test_no_adapters_folder_means_no_names(tmp_path: Path) -> None:
    assert LocalSource((), None).find("a") is None
    assert LocalSource((), None).names() == ()
    assert LocalSource((), tmp_path / "missing").names() == ()


def test_path_below_a_root_is_allowed(root: Path) -> None:
    assert LocalSource((root,), None).check_path(str(root / "a")) == root / "a"
    assert LocalSource((), root).check_path(str(root / "." / "a")) == root / "a"


def test_paths_outside_the_roots_get_one_answer(root: Path) -> None:
    source = LocalSource((root,), None)
    answers = set()
    for path in ("secret", "missing"):
        with pytest.raises(AdapterInvalid) as refusal:
            source.check_path(str(root.parent / path))
        answers.add(refusal.value.message.replace(path, ""))
    with pytest.raises(AdapterInvalid):
        source.check_path(str(root / ".." / "secret"))

    assert len(answers) == 1


def test_missing_folder_below_a_root_is_not_found(root: Path) -> None:
    with pytest.raises(AdapterNotFound):
        LocalSource((root,), None).check_path(str(root / "b"))


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "/" + "x/" * 3000])
def test_what_is_no_path_is_refused(root: Path, path: str) -> None:
    with pytest.raises(AdapterInvalid):
        LocalSource((root,), None).check_path(path)


def test_links_may_not_leave_the_roots(root: Path) -> None:
    source = LocalSource((root,), root)
    (root / "linked").symlink_to(root.parent / "secret")
    (root / "loop").symlink_to(root / "loop")
    folder = small_folder(root / "files")
    folder.weights_path.unlink()
    folder.weights_path.symlink_to(root.parent / "secret" / folder.weights_path.name)

    with pytest.raises(AdapterInvalid, match="link"):
        source.find("linked")
    with pytest.raises(AdapterInvalid, match="link"):
        source.find("files")
    with pytest.raises(AdapterInvalid):
        source.check_path(str(root / "linked"))
    with pytest.raises(AdapterInvalid, match="link"):
        source.check_path(str(root / "files"))
    assert source.find("loop") is None


def test_links_inside_the_roots_are_followed(root: Path) -> None:
    (root / "alias").symlink_to(root / "a")

    assert LocalSource((), root).find("alias") == root / "a"


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.BIN", "weights.pt", "a.pkl", "x.ckpt"])
def test_pickles_are_refused_by_name(folder: Folder, name: str) -> None:
    folder.weights_path.rename(folder.path / name)

    with pytest.raises(AdapterInvalid, match=name):
        refuse_pickles(folder.path)


def test_pickle_beside_safetensors_is_left_alone(folder: Folder) -> None:
    (folder.path / "optimizer.pt").write_bytes(b"\x80\x04.")

    refuse_pickles(folder.path)
