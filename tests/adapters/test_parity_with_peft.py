"""Our layers answer what peft answers, for every kind of adapter, mixed in one batch, again after a
reload.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapters.batch import LoraBatch
from adapters.device import Arena, DeviceArena, HostArena
from adapters.kernels.native.compiled import INSTRUCTION_SETS
from adapters.layers import LoraContext, find_targets, wrap_targets
from adapters.types import AdapterRef, ModelTargets
from adapters.weights import LoraWeights, load_weights
from tests.adapters.making import made_kernel, put, use_of

VOCAB, LENGTH = 97, 7


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_implementation="eager"
    )
    return GPT2LMHeadModel(config).eval()


LLAMA_ADAPTERS: Mapping[str, Mapping[str, object]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 12, r"layers\.[02]\.mlp\.down_proj": 3},
        "alpha_pattern": {"down_proj": 40},
    },
    "layers": {
        "r": 5,
        "lora_alpha": 5,
        "target_modules": ["o_proj", "gate_proj"],
        "layers_to_transform": [1],
    },
    "regex": {"r": 2, "lora_alpha": 9, "target_modules": r".*layers\.(0|2)\..*(k_proj|up_proj)"},
}
GPT2_ADAPTERS: Mapping[str, Mapping[str, object]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "all": {"r": 8, "lora_alpha": 4, "target_modules": "all-linear", "fan_in_fan_out": True},
    "wrong_flag": {"r": 3, "lora_alpha": 6, "target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": False},
}
FAMILIES = {"llama": (llama, LLAMA_ADAPTERS), "gpt2": (gpt2, GPT2_ADAPTERS)}


def save_adapters(
    base: Callable[[], nn.Module], settings: Mapping[str, Mapping[str, object]], to: Path
) -> None:
    """Adapters with random halves (a fresh B is zero), as peft saves them."""
    for seed, (name, one) in enumerate(settings.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft corrects fan_in_fan_out and says so
            model = get_peft_model(base(), LoraConfig(**one))
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        model.save_pretrained(to / name)


def peft_logits(
    base: Callable[[], nn.Module], names: Sequence[str], folder: Path, ids: Tensor, rows: Sequence[str | None]
) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base(), folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(folder / name, adapter_name=name)
    with torch.inference_mode():
        logits: Tensor = model.eval()(input_ids=ids, adapter_names=[row or "__base__" for row in rows]).logits
    return logits


class Ours:
    """A wrapped model and its adapters in an arena."""

    def __init__(self, model: nn.Module, arena: Arena, names: Sequence[str], folder: Path) -> None:
        self.model, self.arena = model, arena
        self.targets: ModelTargets = find_targets(model)
        self.context = LoraContext()
        wrap_targets(model, self.targets, self.context)
        self.weights: dict[str, LoraWeights] = {
            name: load_weights(folder / name, self.targets, torch.float32, 1 << 24) for name in names
        }
        self.write()

    def write(self) -> None:
        offset = 0
        for weights in self.weights.values():
            put(self.arena, weights, offset)
            offset += weights.num_bytes

    def evict(self) -> None:
        for weights in self.weights.values():
            self.arena.evict(AdapterRef("any", weights.revision))

    @torch.inference_mode()
    def logits(self, ids: Tensor, rows: Sequence[str | None]) -> Tensor:
        counts = [(None if row is None else use_of(self.weights[row].revision), ids.shape[1]) for row in rows]
        self.context.batch = LoraBatch.build(self.arena, counts)
        result: Tensor = self.model(input_ids=ids).logits
        self.context.batch = None
        return result


ARENAS = ("reference", *INSTRUCTION_SETS, "groups", "device")


def made_arena(name: str) -> Arena:
    if name == "device":
        return DeviceArena(torch.device("cpu"), 1 << 22, torch.float32)
    return HostArena(made_kernel(name))


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(*FAMILIES[request.param], folder)
    return request.param, folder


@pytest.mark.parametrize("arena", ARENAS)
def test_mixed_batch_answers_what_peft_answers(saved: tuple[str, Path], arena: str) -> None:
    family, folder = saved
    base, settings = FAMILIES[family]
    names = list(settings)
    rows = [*names, None, names[0], None, *names[::-1]]
    ids = torch.randint(0, VOCAB, (len(rows), LENGTH), generator=torch.Generator().manual_seed(1))
    expected = peft_logits(base, names, folder, ids, rows)
    ours = Ours(base(), made_arena(arena), names, folder)

    torch.testing.assert_close(ours.logits(ids, rows), expected, rtol=1e-4, atol=2e-5)
    ours.evict()
    ours.write()
    torch.testing.assert_close(ours.logits(ids, rows), expected, rtol=1e-4, atol=2e-5)


def test_adapters_change_their_own_rows_only(saved: tuple[str, Path]) -> None:
    family, folder = saved
    base, settings = FAMILIES[family]
    names = list(settings)
    ids = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    ours = Ours(base(), made_arena("groups"), names, folder)
    with torch.inference_mode():
        untouched = base()(input_ids=ids).logits

    torch.testing.assert_close(ours.logits(ids, [None]), untouched, rtol=0, atol=0)
    alone = {name: ours.logits(ids, [name]) for name in names}
    mixed = ours.logits(ids.expand(len(names) + 1, -1), [*names, None])
    for row, name in enumerate(names):
        assert (alone[name] - untouched).abs().max() > 1e-2, "the adapter does something"
        torch.testing.assert_close(mixed[row], alone[name][0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(mixed[-1], untouched[0], rtol=1e-4, atol=2e-5)
