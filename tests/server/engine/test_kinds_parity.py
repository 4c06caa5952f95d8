"""Every kind of adapter answers as peft does, token by token, in float32: alone, mixed with others and with
the base model, in chunks, from the prefix cache, and after its place in memory was given to another.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from adapters.types import AdapterRef, AdapterUse
from adapters.weights import LoraWeights, load_weights
from server.model.loader import LoadedModel
from tests.server.kinds_of_adapters import MODULES, Trained, peft_logits, train_all, with_row_tokens
from tests.server.model_rig import DRAWN, Checkpoint, Wish, load_tiny, make_model_rig
from tests.server.tiny_models import greedy, greedy_choices, original, prompt_ids

# peft asks transformers for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTHS = (19, 4)
NUM_TOKENS = 8


def held(model: LoadedModel, trained: dict[str, Trained]) -> dict[str, tuple[AdapterRef, LoraWeights]]:
    loaded = {
        name: load_weights(one.folder, model.targets, model.dtype, 1 << 30, model.weights)
        for name, one in trained.items()
    }
    return {name: (AdapterRef(name, weights.revision), weights) for name, weights in loaded.items()}


@pytest.mark.parametrize("family", MODULES)
def test_every_kind_answers_as_peft_does(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint(family)
    model, base = load_tiny(folder), original(folder)
    trained = train_all(lambda: original(folder), family, tmp_path)
    adapters = held(model, trained)
    prompts = [with_row_tokens(prompt_ids(length, seed=length)) for length in LENGTHS]
    wishes = [
        Wish(prompt, NUM_TOKENS, adapter=AdapterUse.of(ref))
        for ref, _ in adapters.values()
        for prompt in prompts
    ]
    models = [one.model for one in trained.values() for _ in prompts]
    wishes.insert(3, Wish(prompts[0], NUM_TOKENS))
    models.insert(3, base)

    weights = dict(adapters.values())
    expected = make_model_rig(model, adapters=weights).generate(wishes)  # in small chunks, mixed
    for wish, its_model, answer in zip(wishes, models, expected, strict=True):
        assert answer == greedy_choices(its_model, wish.prompt, answer)
    alone = [greedy(base, prompt, NUM_TOKENS) for prompt in prompts]
    assert sum(answer in alone for answer in expected) < 4, "adapters without effect: no test"
    in_torch = make_model_rig(model, adapters=weights, native_adapters=False, step_tokens=31)
    assert in_torch.generate(wishes) == expected, "by torch's kernel"
    sixteen = load_tiny(folder, block_size=16)
    native = make_model_rig(sixteen, adapters=weights, block_size=16, num_blocks=200, step_tokens=31)
    assert native.generate(wishes) == expected, "by our own kernels, layers and all where they know them"
    whole = make_model_rig(model, adapters=weights, step_tokens=1000, num_blocks=200, prefix_caching=True)
    assert whole.generate(wishes, is_staggered=False) == expected, "all in one step"
    assert whole.generate(wishes) == expected, "from the prefix cache"
    largest = max(one.num_bytes for one in weights.values())
    cramped = make_model_rig(model, adapters=weights, arena_bytes=largest, step_tokens=31)
    assert cramped.generate(wishes) == expected, "one after the other, as there is room for one"


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_what_is_told_of_prompts_is_the_same_from_the_whole_model_and_from_its_head(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The head sees slices of rows there, with the adapters of each."""
    folder = checkpoint(family)
    model = load_tiny(folder)
    trained = train_all(
        lambda: original(folder), family, tmp_path, names=("head", "rows", "ends_dora", "plain")
    )
    adapters = held(model, trained)
    sampling = dataclasses.replace(DRAWN, num_prompt_logprobs=0)
    prompt = with_row_tokens(prompt_ids(23, seed=5))
    uses = [None, *(AdapterUse.of(ref) for ref, _ in adapters.values())]
    wishes = [Wish(prompt, 2, adapter=use, sampling=sampling, seed=i) for i, use in enumerate(uses)]
    rig = make_model_rig(model, adapters=dict(adapters.values()), step_tokens=31)
    rig.generate(wishes)
    ids = torch.tensor(prompt)
    for number, model_of in enumerate([original(folder), *(one.model for one in trained.values())]):
        logprobs = peft_logits(model_of, ids).log_softmax(-1)  # type: ignore[arg-type]
        expected = logprobs[:-1].gather(1, ids[1:, None]).squeeze(1)
        scores = torch.tensor([scored.logprob for scored in rig.scores(number)])
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
