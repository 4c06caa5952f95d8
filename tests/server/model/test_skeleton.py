"""A model without its weights has the modules of the one that is served."""

from pathlib import Path

import pytest
import torch

from adapters.types import TargetId
from server.model.errors import ModelError
from server.model.loader import load_model
from server.model.skeleton import load_skeleton
from tests.server.tiny_models import FAMILIES, save_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    loaded = load_model(tmp_path, dtype="float32", device="cpu", progress=lambda stage, fraction: None)

    assert load_skeleton(tmp_path, "float32").targets == loaded.targets


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3"])
def test_weights_that_are_asked_for_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    loaded = load_model(tmp_path, dtype="float32", device="cpu", progress=lambda stage, fraction: None)
    stored = load_skeleton(tmp_path, "float32").weights
    assert stored is not None
    for index, target in enumerate(loaded.targets.targets):
        one = TargetId(index)
        a = torch.randn(2, target.in_features, generator=torch.Generator().manual_seed(index))
        torch.testing.assert_close(stored.squared_norms(one), loaded.weights.squared_norms(one))
        torch.testing.assert_close(stored.project(one, a), loaded.weights.project(one, a))
        bias, expected = stored.bias(one), loaded.weights.bias(one)
        assert (bias is None) == (expected is None)
        if bias is not None:
            torch.testing.assert_close(bias, expected)


def test_weights_are_not_needed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    before = load_skeleton(tmp_path, "float32").targets
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()

    assert load_skeleton(tmp_path, "float32").targets == before


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config"):
        load_skeleton(tmp_path, "float32")
