"""Configs that are served, and those that are refused by the name of the setting."""

import json
import math
import os
from pathlib import Path

import pytest
from peft import LoraConfig

from adapters.errors import AdapterInvalid
from adapters.spec import LoraSpec

PATH = "model.layers.0.self_attn.q_proj"


def spec(**settings: object) -> LoraSpec:
    return LoraSpec.parse({"peft_type": "LORA", "target_modules": ["q_proj"]} | settings)


def test_scale_is_alpha_over_rank() -> None:
    assert spec(r=4, lora_alpha=6).scaling(PATH, 4) == 1.5


def test_rslora_scale_is_alpha_over_root_of_rank() -> None:
    assert spec(r=4, lora_alpha=6, use_rslora=True).scaling(PATH, 4) == 3.0


def test_patterns_change_alpha_of_their_modules_only() -> None:
    made = spec(r=4, lora_alpha=4, alpha_pattern={"q_proj": 12}, use_rslora=True)

    assert made.scaling(PATH, 9) == 4.0
    assert made.scaling("model.layers.0.self_attn.v_proj", 4) == 2.0


def test_what_peft_writes_can_be_read(tmp_path: Path) -> None:
    LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], layers_to_transform=[0]).save_pretrained(
        tmp_path
    )

    read = LoraSpec.from_folder(tmp_path)

    assert (read.rank, read.alpha) == (3, 5.0)
    assert read.matches(PATH)
    assert not read.matches("model.layers.1.self_attn.q_proj")


def test_all_linear_matches_everything_that_is_not_excluded() -> None:
    made = spec(target_modules="All-Linear", exclude_modules=["q_proj"])

    assert made.matches("model.layers.0.mlp.up_proj")
    assert not made.matches(PATH)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"target_parameters": ["mlp.experts.up_proj"]},
        {"layer_replication": [[0, 2]]},
        {"megatron_config": {"a": 1}},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {"beta": 1e-4}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"use_dora": 1},
        {"use_dora": "false"},
    ],
    ids=str,
)
def test_features_that_change_the_arithmetic_are_refused_by_name(settings: dict[str, object]) -> None:
    with pytest.raises(AdapterInvalid, match=next(iter(settings))):
        spec(**settings)


@pytest.mark.parametrize("kind", [None, "IA3", "ADALORA", "lora", 7, ["LORA"]])
def test_other_peft_types_are_refused(kind: object) -> None:
    with pytest.raises(AdapterInvalid, match="peft_type"):
        LoraSpec.parse({"peft_type": kind})


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"r": -1},
        {"r": 1.5},
        {"r": True},
        {"r": "8"},
        {"r": None},
        {"r": 10**12},
        {"lora_alpha": "16"},
        {"lora_alpha": True},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": 10**400},
        {"lora_alpha": [1]},
        {"use_rslora": "yes"},
        {"use_rslora": 1},
        {"target_modules": 5},
        {"target_modules": []},
        {"target_modules": [1]},
        {"target_modules": {"a": 1}},
        {"exclude_modules": 5},
        {"layers_to_transform": "1"},
        {"layers_to_transform": [1.5]},
        {"layers_to_transform": [-1]},
        {"layers_to_transform": [True]},
        {"layers_pattern": "layers"},
        {"layers_pattern": ["(a+)+"], "layers_to_transform": [1]},
        {"layers_pattern": 4, "layers_to_transform": [1]},
        {"rank_pattern": [1]},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": "8"}},
        {"alpha_pattern": {"q_proj": "8"}},
        {"alpha_pattern": "q_proj"},
        {"init_lora_weights": 3},
        {"bias": ["none"]},
        {"bias": {}},
        {"target_modules": "q_proj", "layers_to_transform": [1]},
    ],
    ids=lambda settings: str(settings)[:60],
)
def test_wrong_types_and_ranges_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(AdapterInvalid) as refusal:
        spec(**settings)
    assert len(refusal.value.message) < 400


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"LORA"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"r": NaN}',
        b"x" * 3_000_000,
    ],
    ids=lambda content: str(content[:12]),
)
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)

    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json"):
        LoraSpec.from_folder(tmp_path)


def test_config_that_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="has no"):
        LoraSpec.from_folder(tmp_path)
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(AdapterInvalid, match="not a file"):
        LoraSpec.from_folder(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(AdapterInvalid):
        LoraSpec.from_folder(tmp_path)


def test_unknown_settings_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "of_the_future": 1}))

    assert LoraSpec.from_folder(tmp_path).rank == 8
