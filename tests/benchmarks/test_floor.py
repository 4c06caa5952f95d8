import json
import struct
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from benchmarks.floor import Cost, Load, Machine, cost_of, floor_of

MACHINE = Machine(read_bytes_per_s=1e9, operations_per_s=1e12)
COST = Cost(
    step_bytes=10**9,
    layer_weights=400_000_000,
    num_layers=4,
    head_weights=100_000_000,
    kv_bytes_per_token=1000,
    attention_width=1000,
    adapter_bytes=50_000_000,
    adapter_weights=25_000_000,
)


def write_headers(file: Path, shapes: dict[str, list[int]], weight_bytes: int = 2) -> None:
    """A safetensors file of zeros."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        stop = at + prod(shape) * weight_bytes
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


def write_model(folder: Path, *, tied: bool) -> Path:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8, "num_hidden_layers": 3}
    shapes = {
        "model.embed_tokens.weight": [100, 8],
        "model.layers.0.q_proj.weight": [8, 8],
        "model.norm.weight": [8],
    }
    if not tied:
        shapes["lm_head.weight"] = [100, 8]
    write_headers(folder / "model.safetensors", shapes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_one_user_waits_for_the_weights() -> None:
    floor = floor_of(MACHINE, COST, Load(users=1, prompt_tokens=200, output_tokens=64))
    assert floor.prefill_s == 1.0  # 0.16 s of arithmetic hide behind reading once
    assert floor.step_s == pytest.approx(1.000232)  # 1 GB and 232 tokens of KV
    assert floor.output_tokens_per_s == pytest.approx(64 / (1.0 + 63 * 1.000232))


def test_many_prompts_wait_for_the_arithmetic() -> None:
    floor = floor_of(MACHINE, COST, Load(users=16, prompt_tokens=200, output_tokens=64))
    tokens = 0.75 * 200 + 0.25  # the last of four layers has only the last token
    operations = 2 * tokens * COST.layer_weights + 4 * 1000 * tokens * 201 / 2 + 2 * COST.head_weights
    assert floor.prefill_s == pytest.approx(16 * operations / 1e12)
    assert floor.step_s == pytest.approx(1.0 + 16 * 232e-6)


def test_each_distinct_adapter_is_read_once() -> None:
    base = floor_of(MACHINE, COST, Load(users=4, prompt_tokens=10, output_tokens=8)).step_s
    two = floor_of(MACHINE, COST, Load(users=4, prompt_tokens=10, output_tokens=8, adapters=2)).step_s
    many = floor_of(MACHINE, COST, Load(users=4, prompt_tokens=10, output_tokens=8, adapters=99)).step_s
    assert two - base == pytest.approx(2 * 0.05)
    assert many - base == pytest.approx(4 * 0.05)  # no more of them than users


def test_a_faster_machine_has_a_lower_floor() -> None:
    load = Load(users=8, prompt_tokens=100, output_tokens=20)
    faster = replace(MACHINE, read_bytes_per_s=2e9)
    assert (
        floor_of(faster, COST, load).output_tokens_per_s > floor_of(MACHINE, COST, load).output_tokens_per_s
    )


def test_a_tied_embedding_is_read_as_the_head(tmp_path: Path) -> None:
    cost = cost_of(write_model(tmp_path, tied=True))
    assert (cost.step_bytes, cost.layer_weights, cost.head_weights) == (2 * (800 + 64 + 8), 64, 800)
    assert cost.kv_bytes_per_token == 2 * 3 * 2 * 2 * 2
    assert cost.attention_width == 3 * 4 * 2


def test_an_embedding_beside_the_head_is_only_looked_up(tmp_path: Path) -> None:
    cost = cost_of(write_model(tmp_path, tied=False))
    assert (cost.step_bytes, cost.layer_weights, cost.head_weights) == (2 * (800 + 64 + 8), 64, 800)


def test_adapters_count_with_their_mean(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, rank in zip(folders, (4, 8), strict=True):
        write_headers(folder / "adapter_model.safetensors", {"q.lora_A": [rank, 8], "q.lora_B": [8, rank]})
    cost = cost_of(write_model(tmp_path / "model", tied=True), folders)
    assert (cost.adapter_weights, cost.adapter_bytes) == (96, 192)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        cost_of(tmp_path)
