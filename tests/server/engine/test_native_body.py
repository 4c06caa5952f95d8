"""A body without the Python between its parts: for the models whose body that is, and for no others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm

from server.model.cpu_kernels import KernelChoice
from server.model.loader import LoadedModel
from server.model.native import body as body_module
from server.model.native.body import NativeBody
from tests.server.engine.test_native_decoder import DTYPES, KERNELS, decoder_of, loaded, saved
from tests.server.model_rig import Checkpoint, Wish, make_model_rig
from tests.server.tiny_models import greedy, original, prompt_ids

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def answers_as_transformers_does(model: LoadedModel, folder: Path) -> bool:
    prompt = prompt_ids(20, seed=1)
    answer = make_model_rig(model, block_size=16).generate([Wish(prompt, 12)])
    return answer == [greedy(original(folder), prompt, 12)]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral"])
def test_usual_bodies_and_heads_are_short(
    family: str, dtype: str, kernels: KernelChoice, checkpoint: Checkpoint
) -> None:
    folder = checkpoint(family)
    model = loaded(folder, dtype, kernels)

    assert isinstance(model.body, NativeBody)
    assert model.head is not None
    assert dtype == "bfloat16" or answers_as_transformers_does(model, folder)


def test_the_model_itself_stays_whole(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint("llama"))

    assert type(model.module.model) is LlamaModel
    assert not any(isinstance(part, NativeBody) for part in model.module.modules())


@pytest.mark.parametrize("extra", [{"embedding_multiplier": 3.0}, {"logits_scaling": 0.5}], ids=str)
def test_scales_beside_the_parts_are_seen(extra: dict[str, Any], tmp_path: Path) -> None:
    """Granite has them, and layers like others'."""
    folder = saved(tmp_path, "granite", {"attention_multiplier": 0.25, **extra})
    model = loaded(folder)

    assert decoder_of(model) is not None
    assert model.head is None
    assert not isinstance(model.body, NativeBody)
    assert answers_as_transformers_does(model, folder)


def assert_body_is_kept(folder: Path) -> None:
    model = loaded(folder)
    assert decoder_of(model) is not None
    assert not isinstance(model.body, NativeBody)
    assert answers_as_transformers_does(model, folder)


@pytest.mark.parametrize("place", ["before the layers", "after the norm"])
def test_a_body_that_does_more_is_kept(
    place: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = LlamaModel.forward

    def doing_more(model: LlamaModel, *args: Any, **named: Any) -> Any:
        if place == "before the layers":
            named["inputs_embeds"] = 2 * model.embed_tokens(named.pop("input_ids"))
        answer = compute(model, *args, **named)
        if place == "after the norm":
            answer.last_hidden_state = 2 * answer.last_hidden_state
        return answer

    folder = checkpoint("llama")
    monkeypatch.setattr(LlamaModel, "forward", doing_more)
    assert_body_is_kept(folder)


def test_another_norm_is_kept(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the same attributes as the layers', and another formula."""
    compute = LlamaModel.forward

    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            shifted: Tensor = super().forward(hidden_states) + 0.1
            return shifted

    def with_other_norm(model: LlamaModel, *args: Any, **named: Any) -> Any:
        model.norm.__class__ = Shifted
        return compute(model, *args, **named)

    folder = checkpoint("llama")
    monkeypatch.setattr(LlamaModel, "forward", with_other_norm)
    assert_body_is_kept(folder)


@pytest.mark.parametrize("num_kept", [1, 7, 25])
def test_positions_whose_angles_are_not_kept(
    num_kept: int, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    row = 2 * 16 * torch.float32.itemsize  # cosine and sine of a head
    monkeypatch.setattr(body_module, "_KEPT_BYTES", num_kept * row)
    monkeypatch.setattr(body_module, "_KEPT_AT_ONCE", 3)
    model = loaded(folder)

    assert isinstance(model.body, NativeBody)
    assert answers_as_transformers_does(model, folder), "of 31 positions"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_every_kind_of_rotation(rope: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", {"rope_parameters": {"rope_theta": 10_000.0, **rope}})
    model = loaded(folder)
    prompt = prompt_ids(model.max_position - 20, seed=2)

    assert isinstance(model.body, NativeBody)
    answer = make_model_rig(model, block_size=16).generate([Wish(prompt, 12)])
    assert answer == [greedy(original(folder), prompt, 12)]


def test_a_head_that_is_asked_for_other_rows_answers_for_them(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    model = loaded(folder)
    prompts = [prompt_ids(9 * n + 2, seed=n) for n in range(4)]
    rig = make_model_rig(model, block_size=16, step_tokens=7)

    answers = rig.generate([Wish(prompt, 6) for prompt in prompts])

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert answers == [greedy(reference, prompt, 6) for prompt in prompts]
