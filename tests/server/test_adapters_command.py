"""`motet adapters check`: what it says of good and bad folders, and what it needs for that."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters.weights import load_weights
from server.__main__ import main
from server.embedded.location import adapters_dir, model_dir
from server.model.loader import load_model
from tests.server.tiny_models import save_tiny
from tests.test_layers import ROOT, TORCH_FAMILY, WITHOUT_TORCH

PIRATE = adapters_dir() / "pirate"


def check(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """The exit status, and what was printed."""
    status = main(["adapters", "check", *map(str, words)])
    return status, capsys.readouterr().out


def verdicts(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, object]]:
    return list(json.loads(check(capsys, "--json", *words)[1]))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(PIRATE, folder)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    return folder


def test_our_own_adapters_can_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = check(capsys, *sorted(adapters_dir().iterdir()))

    assert status == 0
    assert len(said.splitlines()) == 4
    assert all(": can be served: " in line and ", rank " in line for line in said.splitlines())


def test_what_is_said_is_what_a_server_would_load(capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(model_dir(), dtype="bfloat16", device="cpu", progress=lambda stage, fraction: None)
    loaded = load_weights(PIRATE, model.targets, torch.bfloat16, 2**40, model.weights)

    (verdict,) = verdicts(capsys, PIRATE, "--dtype", "bfloat16")

    assert verdict == {
        "path": str(PIRATE),
        "can_be_served": True,
        "error": None,
        "kind": "+".join(loaded.kinds) or "lora",
        "rank": loaded.rank,
        "targets": list(loaded.target_names),
        "bytes": loaded.num_bytes,
        "revision": loaded.revision,
        "base_model": "motet-embedded",
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
def test_dora_is_checked_with_the_weights_that_it_depends_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Read from the checkpoint's files one by one: the model is not loaded."""
    folder = tmp_path / "model"
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True)
    get_peft_model(save_tiny("llama", folder), config).save_pretrained(tmp_path / "dora")
    model = load_model(folder, dtype="float32", device="cpu", progress=lambda stage, fraction: None)
    loaded = load_weights(tmp_path / "dora", model.targets, torch.float32, 2**40, model.weights)

    (verdict,) = verdicts(capsys, tmp_path / "dora", "--model", folder, "--dtype", "float32")

    assert (verdict["kind"], verdict["bytes"]) == ("dora", loaded.num_bytes)
    assert verdict["revision"] == loaded.revision


def test_one_bad_folder_among_good_ones_is_named_and_the_status_is_1(
    capsys: pytest.CaptureFixture[str], broken: Path
) -> None:
    status, said = check(capsys, PIRATE, broken)
    good, bad = said.splitlines()

    assert status == 1
    assert good.startswith(f"{PIRATE}: can be served")
    assert bad.startswith(f"{broken}: cannot be served: ")


def test_an_adapter_of_another_base_is_refused_by_the_module(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = json.loads((model_dir() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 2 * config["hidden_size"]}))

    (verdict,) = verdicts(capsys, PIRATE, "--model", tmp_path)

    assert verdict["can_be_served"] is False
    assert "the served model needs" in str(verdict["error"])


def test_an_adapter_that_is_larger_than_its_room_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = check(capsys, PIRATE, "--adapter-memory-bytes", "1KiB")

    assert status == 1
    assert "adapters may take 1024" in said


def test_a_model_that_cannot_be_served_is_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status = main(["adapters", "check", str(PIRATE), "--model", str(tmp_path)])

    assert status == 2
    assert "is not a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["check"], ["check", "x", "--dtype", "int8"], ["check", "x", "--unknown"]]
)
def test_wrong_use_is_status_2(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["adapters", *words])
    assert ended.value.code == 2


def test_broken_folders_alone_are_told_without_torch(tmp_path: Path, broken: Path) -> None:
    code = WITHOUT_TORCH.format(blocked=(*TORCH_FAMILY, "pydantic"), modules=["server.adapters_command"])
    words = ["check", str(tmp_path / "nowhere"), str(broken)]
    code += f"\nsys.exit(sys.modules['server.adapters_command'].main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1, done.stderr
    assert "there is no such folder" in done.stdout
    assert "cut short" in done.stdout
