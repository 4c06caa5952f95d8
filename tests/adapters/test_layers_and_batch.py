"""Which layers are wrapped, what wrapping costs, and how a step's tokens are grouped."""

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from adapters.batch import LoraBatch
from adapters.layers import LoraContext, LoraEmbedding, LoraHead, LoraLinear, find_targets, wrap_targets
from adapters.types import LinearTarget, Revision, TargetId, TargetKind
from tests.adapters.making import host_arena, made_weights, use_of

WRAPPERS = {
    TargetKind.LINEAR: LoraLinear,
    TargetKind.EMBEDDING: LoraEmbedding,
    TargetKind.HEAD: LoraHead,
}
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_targets_are_the_linear_layers_of_the_decoder_layers() -> None:
    targets = find_targets(
        LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1))
    )

    assert targets.num_layers == 2
    assert [target.path.removeprefix("model.layers.0.") for target in targets.targets[:7]] == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert targets.targets[1] == LinearTarget("model.layers.0.self_attn.k_proj", 16, 8)
    assert targets.targets[14:] == (
        LinearTarget("model.embed_tokens", 50, 16, TargetKind.EMBEDDING),
        LinearTarget("lm_head", 16, 50, TargetKind.HEAD),
    )
    assert (targets.embedding, targets.head, targets.is_tied) == (14, 15, False)


def test_linear_layers_outside_of_the_decoder_layers_are_no_targets() -> None:
    model = OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=32))

    linears = [target for target in find_targets(model).targets if target.kind is TargetKind.LINEAR]
    assert {target.path.split(".")[2] for target in linears} == {"layers"}


def test_experts_are_no_targets() -> None:
    model = MixtralForCausalLM(
        MixtralConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, num_local_experts=2)
    )

    assert all("experts" not in target.path for target in find_targets(model).targets)


def test_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder layers"):
        find_targets(nn.Linear(2, 2))


class Doubler(nn.Module):
    """A base layer that is no nn.Linear, as a packed one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], dim=-1)


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 4)])
def test_any_module_can_be_the_base(shape: tuple[int, ...]) -> None:
    weights = made_weights("a", {0: (2, 4, 8)})
    context = LoraContext()
    layer = LoraLinear(Doubler(), TargetId(0), LinearTarget("x", 4, 8), context)
    x = torch.randn(*shape)
    pair = weights.view(TargetId(0))
    assert pair is not None

    without = layer(x)
    context.batch = LoraBatch.build(host_arena([weights]), [(None, 1), (use_of(weights.revision), 2)])
    with_adapter = layer(x)

    flat = x.view(3, 4)
    torch.testing.assert_close(with_adapter.view(3, 8)[0], without.view(3, 8)[0])
    expected = without.view(3, 8)[1:] + flat[1:] @ pair[0].T @ pair[1].T
    torch.testing.assert_close(with_adapter.view(3, 8)[1:], expected)
    assert with_adapter.shape == (*shape[:-1], 8)


def test_layer_that_sees_other_tokens_than_the_step_is_our_bug() -> None:
    weights = made_weights("a", {0: (2, 4, 8)})
    context = LoraContext(LoraBatch.build(host_arena([weights]), [(use_of(weights.revision), 2)]))
    layer = LoraLinear(Doubler(), TargetId(0), LinearTarget("x", 4, 8), context)

    with pytest.raises(AssertionError):
        layer(torch.randn(3, 4))


def test_wrapping_keeps_the_paths_and_the_answers() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1)).eval()
    ids = torch.arange(5)[None]
    before = model(input_ids=ids).logits
    targets = find_targets(model)

    wrap_targets(model, targets, LoraContext())

    for target in targets.targets:
        assert isinstance(model.get_submodule(target.path), WRAPPERS[target.kind])
    assert torch.equal(model(input_ids=ids).logits, before)


def test_step_without_adapters_has_no_batch() -> None:
    assert LoraBatch.build(host_arena([]), [(None, 3), (None, 1)]) is None
    assert LoraBatch.build(host_arena([]), []) is None


def test_some_tokens_of_a_step_are_numbered_anew() -> None:
    a, b = (made_weights(name, {0: (2, 4, 8)}) for name in "ab")
    one, two = use_of("a"), use_of("b")
    batch = LoraBatch.build(host_arena([a, b]), [(two, 3), (None, 1), (one, 3), (two, 1)])
    assert batch is not None

    some = batch.among([2, 3, 6, 7])

    assert some is not None
    assert some.num_tokens == 4
    assert [(group.revision, group.spans) for group in some.groups] == [
        (Revision("a"), ((2, 3),)),
        (Revision("b"), ((0, 1), (3, 4))),
    ]
    assert batch.among([3]) is None, "the base model's"
    assert batch.among([]) is None


def test_groups_are_slices_where_tokens_are_adjacent() -> None:
    a, b = (made_weights(name, {0: (2, 4, 8)}) for name in "ab")
    one, two = use_of("a"), use_of("b")
    rows = [(two, 3), (None, 1), (one, 1), (one, 2), (two, 1), (one, 0)]
    batch = LoraBatch.build(host_arena([a, b]), rows)

    assert batch is not None
    assert batch.num_tokens == 8
    assert [group.revision for group in batch.groups] == [Revision("a"), Revision("b")]
    assert batch.groups[0].rows == slice(4, 7)
    assert isinstance(batch.groups[1].rows, torch.Tensor)
    assert batch.groups[1].rows.tolist() == [0, 1, 2, 7]
    assert batch.groups[1].spans == ((0, 3), (7, 8))
