"""A tied embedding reads its rows out of the packed head: the same bits, and not in memory twice."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from adapters.kernels.native.compiled import INSTRUCTION_SETS, InstructionSet
from adapters.layers import find_targets
from server.model.loader import load_model
from server.model.native.bindings import KernelsMissing, load_kernels
from server.model.native.linear import NativeLayout, NativeLinear
from server.model.packed_embedding import PackedEmbedding, share_head
from server.model.packed_linear import pack_linears
from tests.server.tiny_models import original, save_tiny

NUM_ROWS, WIDTH = 301, 96
DTYPES = [torch.float32, torch.bfloat16]


def layout(dtype: torch.dtype, among: Sequence[InstructionSet] = INSTRUCTION_SETS) -> NativeLayout:
    try:
        return NativeLayout(load_kernels(dtype, among))
    except KernelsMissing as missing:
        pytest.skip(str(missing))


def packed(
    dtype: torch.dtype, scale: float = 1.0, among: Sequence[InstructionSet] = INSTRUCTION_SETS
) -> tuple[torch.Tensor, PackedEmbedding]:
    torch.manual_seed(0)
    table = torch.randn(NUM_ROWS, WIDTH, dtype=dtype)
    head = layout(dtype, among).pack(table, None)
    assert head is not None
    return table, PackedEmbedding(head, scale)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (1, 7), (2, 3), (200,)])
def test_rows_are_those_of_the_table_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, instructions: InstructionSet
) -> None:
    table, embedding = packed(dtype, among=(instructions,))
    ids = torch.randint(NUM_ROWS, shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(embedding(ids), table[ids])


def test_first_and_last_row_are_there_and_others_are_refused() -> None:
    table, embedding = packed(torch.float32)
    assert torch.equal(embedding(torch.tensor([0, NUM_ROWS - 1])), table[[0, -1]])
    for wrong in (-1, NUM_ROWS):
        with pytest.raises(IndexError):
            embedding(torch.tensor([0, wrong]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_rows_are_what_gemma_makes_of_them(dtype: torch.dtype) -> None:
    scale = float(torch.tensor(WIDTH**0.5, dtype=dtype))
    table, embedding = packed(dtype, scale)
    ids = torch.arange(NUM_ROWS)
    assert torch.equal(embedding(ids), table[ids] * torch.tensor(scale, dtype=dtype))


def test_its_weight_says_what_it_is_and_cannot_be_computed_with() -> None:
    _, embedding = packed(torch.bfloat16)
    weight = embedding.weight
    assert (weight.dtype, tuple(weight.shape)) == (torch.bfloat16, (NUM_ROWS, WIDTH))
    assert sum(parameter.nbytes for parameter in embedding.parameters()) == 0
    with pytest.raises(RuntimeError, match="meta"):
        weight[0].tolist()


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3"])
def test_loaded_model_with_a_tied_head_has_one_table_and_embeds_alike(family: str, tmp_path: Path) -> None:
    layout(torch.float32)
    save_tiny(family, tmp_path)
    model = load_model(tmp_path, dtype="float32", device="cpu", progress=lambda stage, fraction: None)
    wrapped = model.module.get_input_embeddings()
    embedding = wrapped.base
    assert isinstance(embedding, PackedEmbedding)
    ids = torch.arange(embedding.num_rows)[None]
    assert torch.equal(embedding(ids), original(tmp_path).get_input_embeddings()(ids))


class _Tied(nn.Module):
    """A body with one decoder layer, and an embedding that may do more than look up."""

    def __init__(self, embedding: nn.Embedding, *, is_tied: bool) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": 1})()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.embedding = embedding
        self.head = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        if is_tied:
            self.head.weight = embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class _Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1


@pytest.mark.parametrize(
    ("make", "is_tied", "shares"),
    [(nn.Embedding, True, True), (nn.Embedding, False, False), (_Shifted, True, False)],
)
def test_only_an_embedding_that_is_tied_and_does_nothing_else_is_replaced(
    make: type[nn.Embedding], is_tied: bool, shares: bool
) -> None:
    model = _Tied(make(NUM_ROWS, WIDTH), is_tied=is_tied).requires_grad_(False)
    targets = find_targets(model)
    pack_linears(model, [layout(torch.float32)], lambda fraction: None)
    assert isinstance(model.head, NativeLinear)
    assert share_head(model, targets) is shares
    assert isinstance(model.embedding, PackedEmbedding) is shares
