"""What is read from a folder, and every way in which a folder can be wrong."""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterTooLarge
from adapters.placement import ALIGNMENT_BYTES
from adapters.types import TargetId
from adapters.weights import LoraWeights, load_weights
from tests.adapters.making import Folder, damage, small_folder, small_targets, small_tensors

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
UP = "base_model.model.model.layers.1.mlp.up_proj.lora_"
BUDGET = 1 << 20


def load(folder: Folder, dtype: torch.dtype = torch.float32, max_bytes: int = BUDGET) -> LoraWeights:
    return load_weights(folder.path, small_targets(), dtype, max_bytes)


def test_halves_come_back_with_the_scale_in_b(folder: Folder) -> None:
    tensors = small_tensors()
    loaded = load(folder)

    for target, linear in enumerate(small_targets().targets):
        pair = loaded.view(TargetId(target))
        assert pair is not None
        key = f"base_model.model.{linear.path}.lora_"
        torch.testing.assert_close(pair[0], tensors[f"{key}A.weight"], rtol=0, atol=0)
        torch.testing.assert_close(pair[1], tensors[f"{key}B.weight"] * 2, rtol=0, atol=0)
    assert loaded.view(TargetId(99)) is None
    assert (loaded.rank, loaded.target_names) == (2, ("q_proj", "up_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_run_is_one_piece_and_every_half_is_aligned(folder: Folder, dtype: torch.dtype) -> None:
    loaded = load(folder, dtype)

    assert loaded.run.is_contiguous()
    assert loaded.run.dtype is dtype
    assert loaded.run.nbytes == loaded.num_bytes
    assert loaded.num_bytes % ALIGNMENT_BYTES == 0
    for entry in loaded.entries.values():
        assert entry.offset_a * dtype.itemsize % ALIGNMENT_BYTES == 0
        assert entry.offset_b * dtype.itemsize % ALIGNMENT_BYTES == 0


def test_scale_is_folded_before_the_numbers_are_rounded(folder: Folder) -> None:
    folder.set(lora_alpha=3, r=2)
    expected = (small_tensors()[f"{Q}B.weight"] * 1.5).to(torch.bfloat16)
    pair = load(folder, torch.bfloat16).view(TargetId(0))

    assert pair is not None
    assert torch.equal(pair[1], expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_stored_dtypes_are_converted(folder: Folder, stored: torch.dtype) -> None:
    folder.save({key: tensor.to(stored) for key, tensor in small_tensors().items()})
    pair = load(folder).view(TargetId(0))

    assert pair is not None
    torch.testing.assert_close(pair[0], small_tensors()[f"{Q}A.weight"].to(stored).float(), rtol=0, atol=0)


def test_adapter_on_a_part_of_the_model_takes_room_for_that_part_only(folder: Folder) -> None:
    tensors = {key: tensor for key, tensor in small_tensors().items() if key.startswith(Q)}
    loaded = load(folder.save(tensors))

    assert list(loaded.entries) == [TargetId(0)]
    assert loaded.num_bytes == 2 * ALIGNMENT_BYTES


def test_rank_is_that_of_each_tensor(folder: Folder) -> None:
    tensors = small_tensors(2) | {
        f"{UP}A.weight": torch.ones(5, 8),
        f"{UP}B.weight": torch.ones(12, 5),
    }
    folder.save(tensors).set(rank_pattern={"layers.1.mlp.up_proj": 5}, alpha_pattern={"1.mlp.up_proj": 10})
    loaded = load(folder)
    pair = loaded.view(TargetId(3))

    assert pair is not None
    assert pair[0].shape == (5, 8)
    assert pair[1].unique().tolist() == [2.0]
    assert loaded.rank == 5


def test_name_of_the_adapter_inside_the_keys_is_accepted(folder: Folder) -> None:
    plain = load(folder).revision
    folder.save({key.replace(".weight", ".default.weight"): t for key, t in small_tensors().items()})

    assert load(folder).revision == plain


def test_same_content_has_the_same_revision_wherever_it_lies(folder: Folder, tmp_path: Path) -> None:
    copy = Folder(tmp_path / "copy")
    shutil.copytree(folder.path, copy.path)
    copy.set(base_model_name_or_path="elsewhere", lora_dropout=0.5)
    shuffled = dict(reversed(small_tensors().items()))

    assert load(copy).revision == load(folder).revision == load(copy.save(shuffled)).revision
    assert load(copy, torch.bfloat16).revision == load(folder).revision


def test_any_change_of_meaning_is_another_revision(folder: Folder) -> None:
    revisions = [load(folder).revision]
    for settings in ({"lora_alpha": 5}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}):
        revisions.append(load(folder.set(**settings)).revision)
    tensors = small_tensors()
    tensors[f"{UP}B.weight"][-1, -1] += 1e-3
    revisions.append(load(folder.save(tensors)).revision)

    assert len(set(revisions)) == 5


# --- Refusals ---------------------------------------------------------------------------------------------


def without(key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in small_tensors().items() if name != key}


def changed(key: str, tensor: Tensor) -> dict[str, Tensor]:
    return small_tensors() | {key: tensor}


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        (without(f"{Q}A.weight"), AdapterInvalid, (f"{Q}A.weight", "missing")),
        (without(f"{UP}B.weight"), AdapterInvalid, (f"{UP}B.weight", "missing")),
        (changed(f"{Q}A.weight", torch.ones(2, 9)), AdapterIncompatible, (f"{Q}A", "[2, 9]", "[2, 8]")),
        (changed(f"{UP}B.weight", torch.ones(13, 2)), AdapterIncompatible, ("[13, 2]", "[12, 2]")),
        (changed(f"{Q}B.weight", torch.ones(8, 3)), AdapterInvalid, ("[2, 8]", "[8, 3]", "rank")),
        (changed(f"{Q}A.weight", torch.ones(16)), AdapterInvalid, ("[16]", "two dimensions")),
        (changed(f"{Q}A.weight", torch.ones(0, 8)), AdapterInvalid, ("rank",)),
        (changed(f"{Q}A.weight", torch.ones(2, 8, dtype=torch.int64)), AdapterInvalid, (f"{Q}A", "I64")),
        (changed(f"{Q}B.weight", torch.full((8, 2), torch.nan)), AdapterInvalid, (f"{Q}B", "NaN")),
        (changed(f"{Q}A.weight", torch.full((2, 8), -torch.inf)), AdapterInvalid, (f"{Q}A", "infinite")),
        (changed(f"{Q}A.weight", torch.full((2, 8), 1e30)), AdapterInvalid, (f"{Q}A", "1.0e+30")),
        (changed(f"{Q}extra", torch.ones(2)), AdapterInvalid, ("extra",)),
        (changed(f"{Q}A.other.weight", torch.ones(2, 8)), AdapterInvalid, ("twice",)),
        (changed("base_model.model.lm_head.weight", torch.ones(2)), AdapterInvalid, ("modules_to_save",)),
        ({}, AdapterInvalid, ("no tensors",)),
        (
            {key.replace("q_proj", "nope"): tensor for key, tensor in small_tensors().items()},
            AdapterIncompatible,
            ("nope", "no linear layer", "small"),
        ),
        (
            {key.replace("layers.1.", "layers.7."): tensor for key, tensor in small_tensors().items()},
            AdapterIncompatible,
            ("layers.7",),
        ),
        (
            {
                "base_model.model.lm_head.lora_A.weight": torch.ones(2, 8),
                "base_model.model.lm_head.lora_B.weight": torch.ones(9, 2),
            },
            AdapterIncompatible,
            ("lm_head", "does not have"),
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    folder: Folder, tensors: dict[str, Tensor], error: type[AdapterError], words: tuple[str, ...]
) -> None:
    with pytest.raises(error) as refusal:
        load(folder.save(tensors))
    for word in words:
        assert word in refusal.value.message


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"r": 3}, "rank 2"),
        ({"rank_pattern": {"q_proj": 4}}, "says 4"),
        ({"target_modules": ["v_proj"]}, "does not target"),
        ({"target_modules": ["q_proj"]}, "up_proj"),
        ({"layers_to_transform": [1]}, "layers.0"),
        ({"exclude_modules": ["q_proj"]}, "q_proj"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": 1e39}, "infinite"),
    ],
    ids=str,
)
def test_config_that_contradicts_the_tensors_is_refused(
    folder: Folder, settings: dict[str, object], word: str
) -> None:
    with pytest.raises(AdapterInvalid, match=word):
        load(folder.set(**settings))


def test_values_that_overflow_the_served_dtype_are_refused(folder: Folder) -> None:
    folder.save(changed(f"{Q}A.weight", torch.full((2, 8), 1e6)))
    load(folder, torch.bfloat16)

    with pytest.raises(AdapterInvalid, match="infinite"):
        load(folder, torch.float16)


def test_larger_than_the_budget_is_refused_before_anything_is_read(folder: Folder) -> None:
    size = load(folder).num_bytes
    load(folder, max_bytes=size)

    with pytest.raises(AdapterTooLarge, match=str(size)):
        load(folder, max_bytes=size - 1)


def test_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.safetensors"):
        load(Folder(tmp_path))
    with pytest.raises(AdapterInvalid):
        load(Folder(tmp_path / "missing"))
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterInvalid, match="not a file"):
        load(Folder(tmp_path))


def written(folder: Folder, header: object, body: bytes = b"", length: int | None = None) -> Folder:
    """A safetensors file by hand."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    folder.weights_path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
    return folder


def entry(start: int, stop: int, shape: object = (2, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        (b"", b"", None),
        (b"{}", b"", 2**63),
        (b"{}", b"", 2**20),
        (b"{}", b"", 100_000_000),
        (b"\xff\xff", b"", None),
        (b"[" * 50_000, b"", None),
        ([], b"", None),
        ({f"{Q}A.weight": 5}, b"", None),
        ({f"{Q}A.weight": {}}, b"", None),
        ({f"{Q}A.weight": entry(0, 64)}, b"\0" * 63, None),
        ({f"{Q}A.weight": entry(0, 64)}, b"\0" * 65, None),
        ({f"{Q}A.weight": entry(4, 68)}, b"\0" * 68, None),
        ({f"{Q}A.weight": entry(64, 0)}, b"\0" * 64, None),
        ({f"{Q}A.weight": entry(-64, 0)}, b"\0" * 64, None),
        ({f"{Q}A.weight": entry(0, 64, (2, 2**40))}, b"\0" * 64, None),
        ({f"{Q}A.weight": entry(0, 64, (-2, -8))}, b"\0" * 64, None),
        ({f"{Q}A.weight": entry(0, 64, (2.0, 8))}, b"\0" * 64, None),
        ({f"{Q}A.weight": entry(0, 64, [[2], 8])}, b"\0" * 64, None),
        ({f"{Q}A.weight": entry(0, 64, [1] * 100)}, b"\0" * 64, None),
        ({f"{Q}A.weight": entry(0, 64, dtype="F4")}, b"\0" * 64, None),
        ({f"{Q}A.weight": entry(0, 64, dtype=["F32"])}, b"\0" * 64, None),
        ({f"{Q}A.weight": entry(0, 64), f"{Q}B.weight": entry(0, 64, (8, 2))}, b"\0" * 64, None),
        ({f"{Q}A.weight": entry(0, 64), f"{Q}B.weight": entry(32, 96, (8, 2))}, b"\0" * 96, None),
        ({f"{Q}A.weight": entry(0, 64), f"{Q}B.weight": entry(80, 144, (8, 2))}, b"\0" * 144, None),
        ({"": entry(0, 0, (0,))}, b"", None),
    ],
)
def test_hostile_headers_are_refused(folder: Folder, header: object, body: bytes, length: int | None) -> None:
    with pytest.raises(AdapterInvalid):
        load(written(folder, header, body, length))


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, -1])
def test_files_cut_short_are_refused(folder: Folder, kept: int) -> None:
    folder.weights_path.write_bytes(folder.weights_path.read_bytes()[:kept])

    with pytest.raises(AdapterInvalid):
        load(folder)


@pytest.mark.parametrize("seed", range(10))
def test_random_damage_is_never_anything_but_an_adapter_error(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    folder = small_folder(
        tmp_path / "a", rank_pattern={r"layers\.\d+\.mlp.*": 2}, alpha_pattern={"q_proj": 7}, bias="none"
    )
    files = {path: path.read_bytes() for path in (folder.config_path, folder.weights_path)}
    refusals = []
    for _ in range(120):
        path = chance.choice(list(files))
        damaged = bytearray(files[path])
        for _ in range(chance.choice([1, 1, 2, 8])):
            damage(damaged, chance, limit=700 if path == folder.weights_path else len(damaged))
        path.write_bytes(damaged)
        try:
            loaded = load(folder)
            assert loaded.run.isfinite().all()
        except AdapterError as error:
            refusals.append(error.message)
        path.write_bytes(files[path])
    assert refusals
    assert all(str(tmp_path) not in message and len(message) < 1500 for message in refusals)
