"""A model without its weights has the modules of the one that is served."""

from pathlib import Path

import pytest

from server.model.errors import ModelError
from server.model.loader import load_model
from server.model.skeleton import load_skeleton
from tests.server.tiny_models import FAMILIES, save_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    loaded = load_model(tmp_path, dtype="float32", device="cpu", progress=lambda stage, fraction: None)

    assert load_skeleton(tmp_path).targets == loaded.targets


def test_weights_are_not_needed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    before = load_skeleton(tmp_path).targets
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()

    assert load_skeleton(tmp_path).targets == before


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config"):
        load_skeleton(tmp_path)
