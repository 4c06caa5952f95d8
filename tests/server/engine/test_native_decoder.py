"""Whole layers in one call: for the models whose layers they are, and for no others."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from server.model.cpu_kernels import CacheChoice, KernelChoice, Quantization
from server.model.errors import ModelNotSupported
from server.model.loader import LoadedModel
from server.model.native.attention import NativeAttention
from server.model.native.bindings import NativeKernels
from server.model.native.decoder import NativeDecoder
from tests.server.engine.test_adapter_parity import held, save_adapters
from tests.server.model_rig import Checkpoint, Wish, load_tiny, make_model_rig, pairwise
from tests.server.tiny_models import greedy, original, prompt_ids, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DTYPES = ["float32", "bfloat16"]
KERNELS: list[KernelChoice] = ["native", "avx2"]


def loaded(
    folder: Path,
    dtype: str = "float32",
    kernels: KernelChoice = "native",
    quantization: Quantization = "none",
    kv_cache_dtype: CacheChoice = "auto",
) -> LoadedModel:
    """Skips the test where our own kernels do not run."""
    try:
        model = load_tiny(
            folder,
            dtype=dtype,
            cpu_kernels=kernels,
            block_size=16,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
        )
    except ModelNotSupported as missing:
        pytest.skip(str(missing))
    assert isinstance(model.attention, NativeAttention)
    return model


def decoder_of(model: LoadedModel) -> NativeDecoder | None:
    found = [module for module in model.module.modules() if isinstance(module, NativeDecoder)]
    assert len(found) < 2
    return found[0] if found else None


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral"])
def test_usual_layers_are_fused(
    family: str, dtype: str, kernels: KernelChoice, checkpoint: Checkpoint
) -> None:
    model = loaded(checkpoint(family), dtype, kernels)

    decoder = decoder_of(model)

    assert decoder is not None
    assert len(decoder.layers) == len(model.layers)
    assert model.kernels.endswith("all layers in one call")


@pytest.mark.parametrize("family", ["qwen3-moe", "glm4", "starcoder2"])
def test_other_layers_are_left_alone(family: str, checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint(family), block_size=16)

    assert decoder_of(model) is None
    assert "one call" not in model.kernels


def saved(folder: Path, model_type: str, extra: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(model_type, extra)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("granite", {"residual_multiplier": 0.3}),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}),
        ("llama", {"hidden_act": "gelu"}),
    ],
    ids=["scaled residual", "a layer without rotation", "another activation"],
)
def test_layers_that_only_look_alike_are_found_out(
    model_type: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    """And answer as transformers does."""
    folder = saved(tmp_path, model_type, extra)
    model = loaded(folder)
    assert decoder_of(model) is None
    prompt = prompt_ids(20, seed=1)

    answer = make_model_rig(model, block_size=16).generate([Wish(prompt, 12)])

    assert answer == [greedy(original(folder), prompt, 12)]


def test_a_model_that_asks_its_layers_for_more_keeps_them(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = LlamaModel.forward

    def curious(model: LlamaModel, *args: Any, **named: Any) -> Any:
        assert all(layer.self_attn.head_dim > 0 for layer in model.layers)
        return compute(model, *args, **named)

    monkeypatch.setattr(LlamaModel, "forward", curious)
    model = loaded(checkpoint("llama"))

    assert decoder_of(model) is None
    assert "one call" not in model.kernels
    assert make_model_rig(model, block_size=16).generate([Wish(prompt_ids(9, seed=1), 4)])


@pytest.mark.parametrize("native", [True, False])
def test_steps_whose_adapters_torch_computes_go_through_the_modules(
    native: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The layers are whole, and nobody else's work."""
    folder = checkpoint("llama")
    model = loaded(folder)
    decoder = decoder_of(model)
    assert decoder is not None
    adapters = held(model, save_adapters(original(folder), "llama", tmp_path))
    ref, weights = adapters["full"]
    called = 0

    def count(*seen: object) -> None:
        nonlocal called
        called += 1

    for layer in decoder.layers:
        layer.register_forward_hook(count)
    rig = make_model_rig(model, block_size=16, adapters={ref: weights}, native_adapters=native)
    rig.generate([Wish(prompt_ids(5, seed=1), 4, adapter=ref)])
    assert called == (0 if native else 4 * len(decoder.layers))

    rig.generate([Wish(prompt_ids(5, seed=1), 4)])
    assert called == (0 if native else 4 * len(decoder.layers)), "a step without adapters"


@pytest.mark.parametrize(("family", "dtype", "kernels"), pairwise(["llama", "qwen2-sliding", "qwen3"]))
def test_answers_do_not_depend_on_company_whoever_has_which_adapter(
    family: str, dtype: str, kernels: KernelChoice, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    model = loaded(folder, dtype, kernels)
    adapters = dict(held(model, save_adapters(original(folder), family, tmp_path)).values())
    refs = [None, *adapters, None, *adapters]
    wishes = [Wish(prompt_ids(7 * n + 3, seed=n), 12, adapter=ref) for n, ref in enumerate(refs)]
    rig = partial(make_model_rig, model, block_size=16, adapters=adapters)

    alone = [rig().generate([wish])[0] for wish in wishes]

    assert len({tuple(answer) for answer in alone}) > 4, "rows that answer alike: no test"
    assert rig().generate(wishes) == alone, "staggered, in chunks of at most 7"
    assert rig(step_tokens=1000).generate(wishes, is_staggered=False) == alone, "all in one step"
    cramped = rig(num_blocks=6, step_tokens=32)
    assert cramped.generate(wishes) == alone, "preempted and computed again"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_weights_of_few_bits_answer_alike_in_any_company(
    quantization: Quantization, dtype: str, kernels: KernelChoice, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """That it is nearly what the layers' modules give over the same weights was proven when it was loaded."""
    folder = checkpoint("qwen2")
    model = loaded(folder, dtype, kernels, quantization)
    assert decoder_of(model) is not None
    adapters = dict(held(model, save_adapters(original(folder), "qwen2", tmp_path)).values())
    wishes = [Wish(prompt_ids(9 * n + 2, seed=n), 10, adapter=ref) for n, ref in enumerate([None, *adapters])]
    rig = partial(make_model_rig, model, block_size=16, adapters=adapters)

    alone = [rig().generate([wish])[0] for wish in wishes]

    assert rig().generate(wishes) == alone
    assert rig(step_tokens=1000).generate(wishes, is_staggered=False) == alone


@pytest.mark.parametrize(
    ("family", "dtype", "kernels"), pairwise(["llama", "qwen2-sliding", "phi3", "qwen3"])
)
def test_a_cache_of_eight_bits_answers_alike_in_any_company(
    family: str, dtype: str, kernels: KernelChoice, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Whole layers and the modules of a model that is not fused."""
    folder = checkpoint(family)
    model = loaded(folder, dtype, kernels, kv_cache_dtype="int8")
    assert (decoder_of(model) is None) == (family == "phi3")
    adapters = dict(held(model, save_adapters(original(folder), family, tmp_path)).values())
    wishes = [Wish(prompt_ids(9 * n + 2, seed=n), 10, adapter=ref) for n, ref in enumerate([None, *adapters])]
    rig = partial(make_model_rig, model, block_size=16, adapters=adapters)

    alone = [rig().generate([wish])[0] for wish in wishes]

    assert rig().generate(wishes) == alone, "in chunks of at most 7"
    assert rig(step_tokens=1000).generate(wishes, is_staggered=False) == alone
    assert rig(num_blocks=6, step_tokens=32).generate(wishes) == alone, "preempted and computed again"


def test_what_cannot_have_a_cache_of_eight_bits_is_refused(checkpoint: Checkpoint) -> None:
    loaded(checkpoint("llama"))  # skips
    for family, kernels, why in (
        ("llama", "torch", "needs our own kernels on a CPU, and linear layers are torch's, as chosen"),
        ("gemma2", "native", "do not know this attention"),
    ):
        with pytest.raises(ModelNotSupported, match=f"--kv-cache-dtype int8 .*{why}"):
            load_tiny(checkpoint(family), cpu_kernels=kernels, block_size=16, kv_cache_dtype="int8")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("family", "dtype", "quantization"),
    [
        ("llama", "float32", "none"),
        ("qwen2-sliding", "bfloat16", "none"),
        ("qwen3", "bfloat16", "none"),
        ("qwen2", "bfloat16", "int8"),
    ],
)
def test_who_leaves_the_last_layer_is_what_it_is_when_all_do(
    family: str,
    dtype: str,
    quantization: Quantization,
    kernels: KernelChoice,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the last token of a prompt is read, and of a prompt in chunks none but the last chunk's."""
    folder = checkpoint(family)
    model = loaded(folder, dtype, kernels, quantization)
    adapters = dict(held(model, save_adapters(original(folder), family, tmp_path)).values())
    decode = NativeKernels.decode
    steps: list[tuple[int, int]] = []  # tokens, and those that are read

    def twice(
        mine: NativeKernels, layers: Any, hidden: Tensor, *rest: Any, wanted: Tensor | None, **more: Any
    ) -> None:
        before, whole = hidden.clone(), hidden.clone()
        decode(mine, layers, whole, *rest, wanted=None, **more)
        decode(mine, layers, hidden, *rest, wanted=wanted, **more)
        wanted = torch.arange(len(hidden)) if wanted is None else wanted
        assert torch.equal(hidden[wanted], whole[wanted])
        left = torch.ones(len(hidden), dtype=torch.bool).index_fill(0, wanted, False)
        assert not left.any() or not torch.equal(hidden[left], whole[left]), "they were computed for nobody"
        assert not torch.equal(hidden, before)
        steps.append((len(hidden), len(wanted)))

    monkeypatch.setattr(NativeKernels, "decode", twice)
    wishes = [Wish(prompt_ids(9 * n + 2, seed=n), 5, adapter=ref) for n, ref in enumerate([None, *adapters])]

    rig = partial(make_model_rig, model, block_size=16, adapters=adapters)
    rig().generate(wishes)
    rig().generate(wishes[-1:])
    rig(step_tokens=1000).generate(wishes, is_staggered=False)

    assert any(tokens == wanted for tokens, wanted in steps)
    assert any(tokens > wanted > 1 for tokens, wanted in steps)
    assert any(wanted == 0 for _, wanted in steps), "a chunk in the middle of a prompt"


def test_outside_of_a_step_it_refuses(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint("llama"))

    with pytest.raises(RuntimeError, match="outside a step"):
        model.module(input_ids=torch.tensor([[1, 2, 3]]))
