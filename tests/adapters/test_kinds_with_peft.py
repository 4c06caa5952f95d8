"""Every kind of adapter side by side in one batch gives the logits of peft: by every kernel, after it has
moved, and after it was evicted and written again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from adapters.batch import LoraBatch
from adapters.device import Arena, DeviceArena, HostArena
from adapters.kernels.native.compiled import INSTRUCTION_SETS
from adapters.layers import LoraContext, find_targets, wrap_targets
from adapters.types import AdapterRef, AdapterUse, AdapterWrite
from adapters.weights import LoraWeights, load_weights
from server.model.base_weights import ModelWeights
from tests.adapters.making import made_kernel, put, use_of
from tests.server.kinds_of_adapters import INVOCATION, Trained, peft_logits, train, train_all, with_row_tokens
from tests.server.tiny_models import prompt_ids, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2", "gemma3", "gpt2")
ARENAS = ("reference", *INSTRUCTION_SETS, "groups", "device")
PROMPT = with_row_tokens(prompt_ids(7, seed=3))


class Ours:
    """A wrapped model and its adapters in an arena."""

    def __init__(self, model: PreTrainedModel, arena: str, trained: Mapping[str, Trained]) -> None:
        self.model = model
        self.context = LoraContext()
        targets = find_targets(model)
        base = ModelWeights([model.get_submodule(target.path) for target in targets.targets], targets, CPU)
        wrap_targets(model, targets, self.context)
        self.weights: dict[str, LoraWeights] = {
            name: load_weights(one.folder, targets, torch.float32, 1 << 24, base)
            for name, one in trained.items()
        }
        self.arena: Arena = (
            DeviceArena(CPU, 1 << 22, torch.float32) if arena == "device" else HostArena(made_kernel(arena))
        )

    def write(self, offset: int = 0) -> None:
        for weights in self.weights.values():
            put(self.arena, weights, offset)
            offset += weights.num_bytes

    def move(self, offset: int) -> None:
        """All of them to the left, by `offset`."""
        for weights in self.weights.values():
            ref = AdapterRef("any", weights.revision)
            self.arena.write(AdapterWrite(ref, offset - 64, weights.num_bytes, moved_from=offset), None)
            offset += weights.num_bytes

    def evict(self) -> None:
        for weights in self.weights.values():
            self.arena.evict(AdapterRef("any", weights.revision))

    def use(self, name: str) -> AdapterUse:
        return use_of(self.weights[name].revision)

    @torch.inference_mode()
    def logits(self, ids: Tensor, rows: Sequence[tuple[AdapterUse | None, int]]) -> Tensor:
        """Of ids [B, T], whose tokens use `rows` one after the other."""
        batch = self.context.batch = LoraBatch.build(self.arena, rows)
        assert batch is not None
        self.context.head = batch.for_head(None)
        result: Tensor = self.model(input_ids=ids).logits
        self.context.batch = self.context.head = None
        return result


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return train_all(lambda: tiny_model(family), family, tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize("arena", ARENAS)
def test_all_kinds_in_one_batch_give_the_logits_of_peft(
    family: str, trained: dict[str, Trained], arena: str
) -> None:
    ids = torch.tensor(PROMPT)
    ours = Ours(tiny_model(family), arena, trained)
    names = [*trained, *reversed(trained)]
    expected = torch.stack([peft_logits(trained[name].model, ids) for name in names])
    with torch.inference_mode():
        base = tiny_model(family)(input_ids=ids[None]).logits[0]
    rows = [*((ours.use(name), len(ids)) for name in names), (None, len(ids))]
    batch = ids.expand(len(rows), -1)
    ours.write(offset=64)

    for _ in range(3):
        got = ours.logits(batch, rows)
        torch.testing.assert_close(got[:-1], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[-1], base, rtol=1e-4, atol=1e-4)
    ours.move(64)
    torch.testing.assert_close(ours.logits(batch, rows)[:-1], expected, rtol=1e-4, atol=1e-4)
    ours.evict()
    ours.write(offset=128)
    torch.testing.assert_close(ours.logits(batch, rows)[:-1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arena", ARENAS)
def test_one_token_of_each_kind(family: str, trained: dict[str, Trained], arena: str) -> None:
    """As in decoding. A sequence of one token needs no others."""
    ours = Ours(tiny_model(family), arena, trained)
    ours.write()
    ids = torch.full((1,), PROMPT[0])
    expected = torch.stack([peft_logits(one.model, ids) for one in trained.values()])
    rows = [(ours.use(name), 1) for name in trained]
    got = ours.logits(ids.expand(len(rows), -1), rows)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arena", [*INSTRUCTION_SETS, "groups"])
@pytest.mark.parametrize("bias", [False, True])
def test_alora_is_plain_lora_from_its_invocation_on(
    family: str, bias: bool, arena: str, tmp_path: Path
) -> None:
    """Also at the head. What comes before is the base's, as if there were no adapter."""
    modules = ["c_attn", "lm_head"] if family == "gpt2" else ["q_proj", "down_proj", "lm_head"]
    settings = {"target_modules": modules, "alora_invocation_tokens": list(INVOCATION), "lora_bias": bias}
    trained = {"alora": train(tiny_model(family), family, settings, tmp_path, seed=1)}
    start = len(PROMPT)
    ids = torch.tensor([*PROMPT, *INVOCATION, *prompt_ids(4, seed=5)])
    ours = Ours(tiny_model(family), arena, trained)
    ours.write()
    assert ours.weights["alora"].invocation_tokens == INVOCATION
    expected = peft_logits(trained["alora"].model, ids)
    with torch.inference_mode():
        base = tiny_model(family)(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(expected[:start], base[:start], rtol=1e-4, atol=1e-4)

    got = ours.logits(ids[None], [(None, start), (ours.use("alora"), len(ids) - start)])[0]

    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got[start:] - base[start:]).abs().max() > 1e-2, "an adapter without effect: no test"


@pytest.mark.parametrize("arena", [*INSTRUCTION_SETS, "groups"])
@pytest.mark.parametrize("kind", ["plain", "lora_bias", "embedding", "head"])
def test_scaled_adapter_is_pefts_with_another_scaling(
    family: str, trained: dict[str, Trained], kind: str, arena: str
) -> None:
    ids = torch.tensor(PROMPT)
    ours = Ours(tiny_model(family), arena, {kind: trained[kind]})
    ours.write()
    model = trained[kind].model
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:  # its own `scale_layer` forgets embeddings
        layer.scaling["default"] *= 0.25
    expected = peft_logits(model, ids)
    for layer in layers:
        layer.scaling["default"] /= 0.25

    use = use_of(ours.weights[kind].revision, scales=[0.25])

    torch.testing.assert_close(ours.logits(ids[None], [(use, len(ids))])[0], expected, rtol=1e-4, atol=1e-4)
