"""Broken and hostile adapter folders, offered to a real server in every way: each costs only a 4xx."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.running import REPOSITORY, RunningServer, start
from tests.nursery import Nursery

OURS = REPOSITORY / "server" / "embedded" / "adapters" / "pirate"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHAT = {"messages": [{"role": "user", "content": "What is Motet?"}], "temperature": 0, "max_tokens": 20}

Break = Callable[[Path], None]


def edit_config(**changes: object) -> Break:
    def break_it(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return break_it


def edit_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Break:
    def break_it(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return break_it


def overwrite(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content) and None


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def link_out(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(OURS / WEIGHTS)


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def without_first_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[1:])


def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(t.shape[0] + 1, t.shape[1] + 1) for name, t in tensors.items()}


def elsewhere(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("layers.", "blocks."): t for name, t in tensors.items()}


def not_a_number(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(t, float("nan")) for name, t in tensors.items()}


BROKEN: dict[str, Break] = {
    "config is not JSON": overwrite(CONFIG, b"{"),
    "config is a list": overwrite(CONFIG, b"[]"),
    "config is not UTF-8": overwrite(CONFIG, b"\xff\xfe"),
    "config is missing": lambda folder: (folder / CONFIG).unlink(),
    "rank is a word": edit_config(r="eight"),
    "rank is huge": edit_config(r=10**9),
    "other method": edit_config(peft_type="PREFIX_TUNING"),
    "dora": edit_config(use_dora=True),
    "modules to save": edit_config(modules_to_save=["lm_head"]),
    "trained bias": edit_config(bias="all"),
    "weights are missing": lambda folder: (folder / WEIGHTS).unlink(),
    "weights are empty": overwrite(WEIGHTS, b""),
    "weights are noise": overwrite(WEIGHTS, bytes(range(256)) * 64),
    "header is huge": overwrite(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"),
    "weights are cut": truncate,
    "weights are pickled": only_pickle,
    "weights lie elsewhere": link_out,
    "half is missing": edit_weights(without_first_half),
    "shapes are wrong": edit_weights(wider),
    "other model's modules": edit_weights(elsewhere),
    "not numbers": edit_weights(not_a_number),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def lending(nursery: Nursery, folder: Path) -> Iterator[RunningServer]:
    running = start("--adapters-dir", str(folder), nursery=nursery)
    yield running
    assert running.stop() == 0, "\n".join(running.lines)


def chat(server: RunningServer, model: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "model": model}, timeout=60)


@pytest.mark.parametrize("what", list(BROKEN))
def test_broken_folder_costs_its_own_request_a_4xx(
    lending: RunningServer, folder: Path, tmp_path: Path, what: str
) -> None:
    name = what.replace(" ", "-").replace("'", "")
    shutil.copytree(OURS, tmp_path / name)
    BROKEN[what](tmp_path / name)
    (tmp_path / name).rename(folder / name)  # nobody sees it while it is still whole
    before = chat(lending, "pirate").json()["choices"][0]["message"]["content"]

    asked = chat(lending, name)
    loaded = httpx.post(
        f"{lending.url}/v1/load_lora_adapter",
        json={"lora_name": name, "lora_path": str(folder / name)},
        timeout=60,
    )
    lorax = httpx.post(
        f"{lending.url}/generate",
        json={"inputs": "x", "parameters": {"adapter_id": name, "max_new_tokens": 1}},
        timeout=60,
    )

    for answer in (asked, loaded):
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"]
    assert 400 <= lorax.status_code < 500
    assert lorax.json()["error_type"]
    for text in (asked.text, loaded.text, lorax.text):
        assert "/etc" not in text
        assert "Traceback" not in text
    assert chat(lending, "pirate").json()["choices"][0]["message"]["content"] == before
    assert name not in [card["id"] for card in httpx.get(f"{lending.url}/v1/models").json()["data"]]
    lending.wait_until_idle()


@pytest.mark.parametrize(
    "path", ["/etc", "/etc/passwd", "../../etc/passwd", "", "\0", "/proc/self", str(OURS), "~", "x" * 5000]
)
def test_paths_outside_the_folder_are_refused_alike(lending: RunningServer, path: str) -> None:
    answer = httpx.post(
        f"{lending.url}/v1/load_lora_adapter",
        json={"lora_name": "intruder", "lora_path": path},
        timeout=60,
    )

    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert "root:" not in answer.text


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "/etc", "a\0b", "pirate/../..", "x" * 3000, "né"])
def test_names_with_tricks_are_unknown(lending: RunningServer, name: str) -> None:
    assert chat(lending, name).status_code in (400, 404)


def test_good_adapter_is_loaded_and_unloaded_twice_over(lending: RunningServer, folder: Path) -> None:
    """Both admin routes can be repeated, as controllers do."""
    shutil.copytree(OURS, folder / ".staged")
    wish = {"lora_name": "sailor", "lora_path": str(folder / ".staged")}

    for _ in range(2):
        assert httpx.post(f"{lending.url}/v1/load_lora_adapter", json=wish, timeout=60).status_code == 200
    assert (
        chat(lending, "sailor").json()["choices"][0]["message"]["content"]
        == (chat(lending, "pirate").json()["choices"][0]["message"]["content"])
    )
    for _ in range(2):
        done = httpx.post(f"{lending.url}/v1/unload_lora_adapter", json={"lora_name": "sailor"}, timeout=60)
        assert done.status_code == 200
    assert chat(lending, "sailor").status_code == 404
