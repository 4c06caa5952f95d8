"""Checkpoint folders, good and bad."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapters.kernels.native import compiled
from adapters.kernels.native.compiled import KernelsMissing
from server.model import loader
from server.model.cpu_kernels import KernelChoice
from server.model.errors import ModelInvalid, ModelNotFound, ModelNotSupported
from server.model.loader import LoadedModel, load_model, resolve_dtype
from server.model.native import bindings
from server.model.native.bindings import load_kernels
from server.model.onednn_linear import OneDnnLayout
from server.model.packed_linear import PackedLinear
from server.types import SamplingDefaults
from tests.server.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny, tiny_config

CPU = torch.device("cpu")


def load(folder: Path, *, dtype: str = "float32") -> LoadedModel:
    return load_model(folder, dtype=dtype, device="cpu", progress=lambda stage, fraction: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("qwen2", tmp_path)
    return tmp_path


def rewrite(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_loaded_model_knows_what_the_engine_needs(folder: Path) -> None:
    stages: list[tuple[str, float]] = []
    model = load_model(
        str(folder),
        dtype="float32",
        device="cpu",
        progress=lambda stage, fraction: stages.append((stage, fraction)),
    )
    assert (model.vocab_size, model.max_position, model.dtype, model.device) == (
        VOCAB_SIZE,
        256,
        torch.float32,
        CPU,
    )
    assert len(model.layers) == 3
    assert model.hidden_size == 64
    assert len(model.targets.targets) == 3 * 7 + 2, "with the embedding and the head"
    assert model.num_parameters == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert all(0.0 <= fraction <= 1.0 for _, fraction in stages)
    assert ("loading weights", 1.0) in stages


def test_nothing_looks_for_padding(folder: Path) -> None:
    """GPT-2 for one would wait for the device in every step, to look at the first and last id."""
    assert load(folder).module.config.get_text_config().pad_token_id is None


@pytest.mark.skipif(not OneDnnLayout.takes(torch.float32), reason="this build of torch cannot pack")
def test_linear_layers_are_packed_and_their_weights_gone(folder: Path) -> None:
    model = load(folder)
    assert sum(isinstance(module, PackedLinear) for module in model.module.modules()) == 3 * 7 + 1
    assert not any(isinstance(module, nn.Linear) for module in model.module.modules())
    assert not any(isinstance(module, nn.Embedding) for module in model.module.modules()), "the head has it"
    names = [name for name, parameter in model.module.named_parameters() if parameter.dim() > 1]
    assert names == []


@pytest.mark.skipif(not OneDnnLayout.takes(torch.float32), reason="this build of torch cannot pack")
def test_without_kernels_of_our_own_a_tied_embedding_stays(folder: Path) -> None:
    model = load_model(folder, dtype="float32", device="cpu", progress=lambda *_: None, cpu_kernels="onednn")
    names = [name for name, parameter in model.module.named_parameters() if parameter.dim() > 1]
    assert names == ["model.embed_tokens.base.weight"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checkpoint_is_served_in_the_dtype_that_was_asked_for(folder: Path, dtype: str) -> None:
    model = load(folder, dtype=dtype)
    assert model.dtype == getattr(torch, dtype)
    assert model.module.get_input_embeddings().weight.dtype == model.dtype


@pytest.mark.parametrize(
    ("features", "kernels", "family", "dtype"),
    [
        ({"avx512_bf16", "avx2"}, "torch", "llama", torch.bfloat16),
        ({"avx512_bf16", "avx2"}, "auto", "mixtral", torch.bfloat16),
        ({"amx_tile", "avx2"}, "auto", "llama", torch.bfloat16),
        ({"avx2"}, "auto", "llama", torch.bfloat16),
        ({"avx2"}, "auto", "mixtral", torch.float32),
        ({"avx2"}, "torch", "llama", torch.float32),
        (set(), "auto", "llama", torch.float32),
    ],
)
def test_automatic_dtype_is_one_that_is_computed_in(
    features: set[str],
    kernels: KernelChoice,
    family: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (loader, compiled, bindings):
        monkeypatch.setattr(module, "cpu_has", lambda feature: feature in features)
    try:
        load_kernels(torch.bfloat16, beside_amx=True)
    except KernelsMissing:
        if "avx2" in features:
            pytest.skip("nothing was compiled")
    assert resolve_dtype("auto", CPU, tiny_config(*FAMILIES[family]), kernels) is dtype


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ModelNotSupported, match="float8"):
        resolve_dtype("float8", CPU, None)


def test_ends_of_sequence_come_from_the_generation_config(folder: Path) -> None:
    rewrite(folder / "config.json", eos_token_id=3)
    (folder / "generation_config.json").unlink()
    assert load(folder).eos_token_ids == {3}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert load(folder).eos_token_ids == {5, 6}


def test_model_without_an_end_of_sequence_has_none(folder: Path) -> None:
    assert load(folder).eos_token_ids == frozenset()


def test_recommended_sampling_is_what_the_file_says_and_nothing_else(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.7, "top_k": 20, "top_p": None, "do_sample": True}))
    assert load(folder).generation_defaults == SamplingDefaults(temperature=0.7, top_k=20)
    path.unlink()
    assert load(folder).generation_defaults == SamplingDefaults()


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no folder"):
        load(tmp_path / "nothing")


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelInvalid, match=r"config\.json"):
        load(folder)


def test_unknown_model_type_is_refused(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="from-the-future")
    with pytest.raises(ModelNotSupported, match="'from-the-future'"):
        load(folder)


def test_code_of_the_checkpoint_is_never_run(folder: Path) -> None:
    (folder / "code.py").write_text("raise SystemExit('ran')")
    rewrite(folder / "config.json", model_type="own", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(ModelNotSupported, match="never run"):
        load(folder)


def test_file_may_change_while_the_model_is_served(folder: Path) -> None:
    model = load(folder)
    before = {name: parameter.clone() for name, parameter in model.module.named_parameters()}
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.module.named_parameters())


def test_pickled_weights_are_not_read(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match="safetensors"):
        load(folder)


def test_missing_weight_is_refused_and_never_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelInvalid, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_weight_of_another_shape_is_refused(folder: Path) -> None:
    rewrite(folder / "config.json", intermediate_size=100)
    with pytest.raises(ModelInvalid):
        load(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelInvalid):
        load(folder)
