"""A signature changes with every write to an adapter's files, and with nothing else."""

import os
from pathlib import Path

import pytest

from adapters.signature import sign


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("old bytes")
    return folder


def test_nothing_written_is_nothing_changed(folder: Path) -> None:
    before = sign(folder)
    (folder / "adapter_model.safetensors").read_text()
    (folder / "optimizer.pt").write_text("a trainer's")

    assert sign(folder) == before
    assert hash(sign(folder)) == hash(before)


@pytest.mark.parametrize("name", ["adapter_config.json", "chat_template.jinja", "tokenizer.json"])
def test_a_file_that_is_written_is_a_change(folder: Path, name: str) -> None:
    before = sign(folder)
    (folder / name).write_text("new")

    assert sign(folder) != before


def test_a_copy_that_keeps_size_and_time_is_a_change(folder: Path) -> None:
    """As `rsync --inplace --times` makes of an artefact whose times are fixed."""
    weights = folder / "adapter_model.safetensors"
    os.utime(weights, (1, 1))
    before = sign(folder)
    weights.write_text("new bytes")
    os.utime(weights, (1, 1))

    assert sign(folder) != before


def test_another_target_of_a_link_is_a_change(folder: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        os.link(folder / name, other / name)
    link.symlink_to(folder)
    before = sign(link)
    assert before == sign(folder)

    link.unlink()
    link.symlink_to(other)

    assert sign(link) != before


def test_a_folder_without_files_has_a_signature_too(tmp_path: Path) -> None:
    assert sign(tmp_path) != sign(tmp_path / "missing")
