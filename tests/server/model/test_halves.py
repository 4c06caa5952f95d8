"""The two halves of a model, against the whole."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapters.batch import LoraBatch
from adapters.layers import LoraContext, find_targets, wrap_targets
from adapters.types import LoraEntry, Revision, TargetKind
from adapters.weights import LoraWeights
from server.model.halves import Halves, HeadRows
from server.model.loader import load_model
from tests.adapters.making import host_arena, use_of
from tests.server.tiny_models import VOCAB_SIZE, original, save_tiny, tiny_config

IDS, POSITIONS = torch.tensor([5, 6, 7, 8, 9]), torch.arange(5)
ROWS = HeadRows(torch.tensor([1, 4]), [1, 4])
ALL = HeadRows(torch.arange(5), range(5))


def body_of(model: nn.Module) -> nn.Module:
    return model.base_model  # type: ignore[return-value]


@pytest.fixture(params=["llama", "gpt2", "gemma2", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    save_tiny(request.param, tmp_path)
    return original(tmp_path)


@torch.inference_mode()
def test_head_after_body_is_the_whole_model(model: nn.Module) -> None:
    halves = Halves(model, body_of(model), LoraContext())
    body = halves.body(IDS, POSITIONS)
    whole: Tensor = model(IDS[None]).logits[0]
    torch.testing.assert_close(body.logits(ROWS), whole[ROWS.index])
    torch.testing.assert_close(body.logits(ALL), whole)
    torch.testing.assert_close(halves.logits(IDS, POSITIONS, ROWS), whole[ROWS.index])


@torch.inference_mode()
def test_body_runs_once_and_is_itself_again_afterwards(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = Halves(model, body_of(model), LoraContext())
    body = halves.body(IDS, POSITIONS)
    first = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    with monkeypatch.context() as patched:
        patched.setattr(first, "forward", lambda *args: pytest.fail("the body ran again"))
        body.logits(ROWS)
    assert "forward" not in vars(body_of(model))
    other = halves.body(IDS + 1, POSITIONS)
    assert not torch.equal(other.hidden, body.hidden)


@torch.inference_mode()
def test_body_is_itself_again_after_a_failure(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = Halves(model, body_of(model), LoraContext())
    body = halves.body(IDS, POSITIONS)
    monkeypatch.setattr(model.get_output_embeddings(), "forward", lambda *args: 1 / 0)  # type: ignore[operator]
    with pytest.raises(ZeroDivisionError):
        body.logits(ROWS)
    assert "forward" not in vars(body_of(model))


class WithoutKeeping(nn.Module):
    """A model that always computes all logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> object:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


@torch.inference_mode()
def test_models_that_keep_all_logits_give_the_rows_too(model: nn.Module) -> None:
    halves = Halves(WithoutKeeping(model), body_of(model), LoraContext())
    whole: Tensor = model(IDS[None]).logits[0]
    torch.testing.assert_close(halves.logits(IDS, POSITIONS, ROWS), whole[ROWS.index])
    torch.testing.assert_close(halves.body(IDS, POSITIONS).logits(ROWS), whole[ROWS.index])


@torch.inference_mode()
@pytest.mark.parametrize("keeps", [True, False])
def test_adapter_of_the_head_changes_its_own_rows_however_many_are_wanted(
    model: nn.Module, keeps: bool
) -> None:
    whole: Tensor = model(IDS[None]).logits[0]
    targets, lora = find_targets(model), LoraContext()
    wrap_targets(model, targets, lora)
    halves = Halves(model if keeps else WithoutKeeping(model), body_of(model), lora)
    assert targets.head is not None
    head = targets.targets[targets.head]
    size = 2 * (head.in_features + head.out_features)
    entry = LoraEntry(2, head.in_features, head.out_features, 0, 2 * head.in_features, kind=TargetKind.HEAD)
    run = torch.randn(size, generator=torch.Generator().manual_seed(0))
    weights = LoraWeights(Revision("a"), run, {targets.head: entry}, 2, (), run.nbytes)
    lora.batch = LoraBatch.build(host_arena([weights]), [(None, 2), (use_of("a"), 3)])

    changed = halves.logits(IDS, POSITIONS, ALL)

    torch.testing.assert_close(changed[:2], whole[:2])
    assert (changed[2:] - whole[2:]).abs().amax(1).min() > 1e-2
    backwards = HeadRows(torch.tensor([4, 1, 3]), [4, 1, 3])
    for rows in (ROWS, backwards, HeadRows(torch.tensor([0]), [0])):
        expected = changed[rows.index]
        torch.testing.assert_close(halves.logits(IDS, POSITIONS, rows), expected)
        torch.testing.assert_close(halves.body(IDS, POSITIONS).logits(rows), expected)
    assert lora.head is None


def test_vectors_have_the_size_that_the_body_returns(tmp_path: Path) -> None:
    """OPT may project its hidden states before the output matrix."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("opt", {"ffn_dim": 96, "word_embed_proj_dim": 24})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float32", device="cpu", progress=lambda stage, fraction: None)
    assert loaded.hidden_size == 24
    assert loaded.vocab_size == VOCAB_SIZE
