"""What the probe sees, and what is refused at start instead of being answered wrongly."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from server.model.attention import ATTENTION_NAME, LAYER_ATTRIBUTE, LayerSpec, register_attention
from server.model.errors import ModelNotSupported
from server.model.loader import load_model
from server.model.probe import check_config, find_body, max_position, probe_layers
from tests.server.tiny_models import FAMILIES, WINDOW, tiny_config

_HYBRID = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_HYBRID |= {"shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_HYBRID |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
_OLD = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "falcon": (
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        "FalconForCausalLM .*attention interface",
    ),
    "bloom": ({"n_head": 4, "n_layer": 3}, "BloomForCausalLM .*attention interface"),
    "gptj": (_OLD | {"rotary_dim": 8}, "GPTJForCausalLM .*attention interface"),
    "codegen": (_OLD | {"rotary_dim": 8}, "CodeGenForCausalLM .*attention interface"),
    "mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 3}, "MptForCausalLM cannot be served"),
    "rwkv": ({"attention_hidden_size": 64}, "RwkvForCausalLM .*attention interface"),
    "qwen3_next": (
        _HYBRID | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
        "Qwen3NextForCausalLM has layers of type linear_attention",
    ),
    "lfm2": ({"layer_types": ["conv", "conv", "full_attention"]}, "Lfm2ForCausalLM has layers of type conv"),
    "mamba2": ({"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}, "Mamba2ForCausalLM"),
    "bert": ({}, "BertLMHeadModel .*not causal"),
    "doge": ({}, "DogeForCausalLM .*its own attention masks"),
    "diffllama": ({}, "DiffLlamaForCausalLM .*6 of its 3 layers"),
    "t5": ({"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}, "encoder-decoder"),
}


def built(family: str) -> tuple[nn.Module, Any]:
    register_attention()
    model_type, extra = FAMILIES[family]
    config = tiny_config(model_type, extra)
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval(), config


def specs(family: str) -> list[LayerSpec]:
    return [layer.spec for layer in probe_layers(*built(family))]


@pytest.mark.filterwarnings("ignore")  # of transformers, about what these configs lack
@pytest.mark.parametrize("model_type", REFUSED)
def test_architecture_that_cannot_be_served_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    extra, message = REFUSED[model_type]
    config = tiny_config(model_type, extra)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelNotSupported, match=message):
        load_model(tmp_path, dtype="float32", device="cpu", progress=lambda stage, fraction: None)


def test_heads_and_dimensions_are_read_from_the_calls() -> None:
    assert specs("llama") == [LayerSpec(2, 16, 16, None, None)] * 3
    assert specs("deepseek-v3") == [LayerSpec(4, 16, 12, None, None)] * 3


def test_windows_are_read_layer_by_layer() -> None:
    assert [spec.sliding_window for spec in specs("qwen2-sliding")] == [None, WINDOW, WINDOW]
    assert [spec.sliding_window for spec in specs("gemma3")] == [WINDOW, None, WINDOW]


def test_caps_are_seen() -> None:
    assert {spec.softcap for spec in specs("gemma2")} == {5.0}


def test_probe_leaves_no_trace_on_the_modules() -> None:
    model, config = built("llama")
    probe_layers(model, config)
    assert not any(hasattr(module, LAYER_ATTRIBUTE) for module in model.modules())


def test_layer_that_is_never_called_is_missed() -> None:
    model, config = built("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **seen: (hidden_states, None)
    with pytest.raises(ModelNotSupported, match="2 of its 3 layers"):
        probe_layers(model, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_body_is_the_child_with_all_layers(family: str) -> None:
    model, config = built(family)
    body = find_body(model, config, probe_layers(model, config))
    assert body in list(model.children())
    assert body is not model.get_output_embeddings()  # type: ignore[operator]


def test_model_whose_layers_are_not_in_one_module_is_refused() -> None:
    model, config = built("llama")
    layers = probe_layers(model, config)
    halves = nn.ModuleDict({"first": layers[0].module, "second": nn.ModuleList(x.module for x in layers[1:])})
    with pytest.raises(ModelNotSupported, match="not in one module"):
        find_body(halves, config, layers)


def test_layers_that_share_a_module_are_refused() -> None:
    model, config = built("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    with pytest.raises(ModelNotSupported, match="share one attention module"):
        probe_layers(model, config)


def test_sliding_layer_that_keeps_its_window_to_itself_is_refused() -> None:
    model, config = built("llama")
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ModelNotSupported, match="do not tell their window"):
        probe_layers(model, config)


def test_quantised_checkpoint_is_refused() -> None:
    config = tiny_config("llama", {})
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelNotSupported, match="quantised"):
        check_config(config)


def text_config(**fields: Any) -> Any:
    text = SimpleNamespace(**{"max_position_embeddings": 4096, **fields})
    text.get_text_config = lambda: text
    return text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 4096),
        ({"rope_parameters": {"rope_type": "default"}}, 4096),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 4096),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 1024}}, 1024),
        ({"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 512}, 512),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "original_max_position_embeddings": 2048},
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            2048,
        ),
        ({"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 99}}, 99),
        ({"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 256}, 256),
    ],
)
def test_context_ends_where_answers_would_depend_on_the_batch(fields: dict[str, Any], expected: int) -> None:
    assert max_position(text_config(**fields)) == expected


def test_probe_works_in_the_served_dtype() -> None:
    model, config = built("qwen2")
    assert len(probe_layers(model.to(torch.bfloat16), config)) == 3
