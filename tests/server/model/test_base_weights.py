"""The model's weights as adapters' loaders see them, against the checkpoint that it was loaded from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.types import TargetId, TargetKind
from server.model.loader import LoadedModel, load_model
from tests.server.tiny_models import original, save_tiny


def load(folder: Path, dtype: str) -> LoadedModel:
    return load_model(folder, dtype=dtype, device="cpu", progress=lambda stage, fraction: None)


def weight_of(module: torch.nn.Module, kind: TargetKind) -> Tensor:
    """W [out, in]; GPT-2's and an embedding's are stored transposed."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if kind is TargetKind.EMBEDDING or type(module).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_lengths_products_and_biases_are_those_of_the_checkpoint(
    family: str, dtype: str, tmp_path: Path
) -> None:
    """Untied and tied heads, biases, Conv1D; packed weights where the machine packs the dtype."""
    save_tiny(family, tmp_path)
    model, source = load(tmp_path, dtype), original(tmp_path).to(getattr(torch, dtype))
    kinds = {target.kind for target in model.targets.targets}
    assert kinds == set(TargetKind)
    assert model.targets.is_tied == (family != "llama")
    for index, target in enumerate(model.targets.targets):
        base = source.get_submodule(target.path)
        weight = weight_of(base, target.kind).float()
        assert weight.shape == (target.out_features, target.in_features)
        a = torch.randn(3, target.in_features, generator=torch.Generator().manual_seed(index))
        tolerance = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 1e-3}[dtype]
        norms, product = (
            model.weights.squared_norms(TargetId(index)),
            model.weights.project(TargetId(index), a),
        )
        torch.testing.assert_close(norms, weight.square().sum(1), rtol=1e-5, atol=1e-6)
        expected = weight @ a.t()
        torch.testing.assert_close(product, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
        assert (norms.dtype, product.dtype) == (torch.float32, torch.float32)
        bias, expected_bias = model.weights.bias(TargetId(index)), getattr(base, "bias", None)
        assert (bias is None) == (expected_bias is None)
        if bias is not None:
            torch.testing.assert_close(bias, expected_bias.float())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("num_rows", [1, 7, 1000])
def test_rows_of_tokens_come_in_order_and_bounded(family: str, num_rows: int, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    model, source = load(tmp_path, "float32"), original(tmp_path)
    for target in (model.targets.embedding, model.targets.head):
        assert target is not None
        table = source.get_submodule(model.targets.targets[target].path).get_parameter("weight")
        parts = list(model.weights.token_rows(target, num_rows))
        assert max(part.shape[0] for part in parts) <= num_rows
        assert torch.equal(torch.cat(parts), table)


def test_asking_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    model = load(tmp_path, "float32")
    twice: list[list[Tensor]] = []
    for _ in range(2):
        twice.append(
            [
                model.weights.project(TargetId(i), torch.ones(1, t.in_features))
                for i, t in enumerate(model.targets.targets)
            ]
        )
        for index in range(len(model.targets.targets)):
            model.weights.squared_norms(TargetId(index))
    assert all(torch.equal(first, second) for first, second in zip(*twice, strict=True))
    assert model.weights.squared_norms(TargetId(0)) is model.weights.squared_norms(TargetId(0)), (
        "worked out once"
    )
