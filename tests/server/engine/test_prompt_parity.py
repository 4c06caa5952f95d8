"""Prompt log-probabilities and vectors equal those of transformers and peft, in float32, however the prompts
are cut and whatever else is in the batch.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from adapters.types import AdapterRef
from adapters.weights import load_weights
from server.engine import prompt_reader
from server.engine.plan import ScoredToken
from server.types import Pooling, SamplingParams
from tests.server.model_rig import GREEDY, Checkpoint, ModelRig, Wish, load_tiny, make_model_rig
from tests.server.tiny_models import FAMILIES, VOCAB_SIZE, greedy, greedy_choices, original, prompt_ids

# peft asks transformers for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTHS = (1, 2, 5, 23, 40, 9)  # one token; two; less than a block; longer than the window; many chunks


def logits_of(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0]


def hidden_of(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    """[T, H] after the final norm: transformers gives it as the last of the hidden states."""
    with torch.inference_mode():
        return model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].float()


def vector_of(model: PreTrainedModel, prompt: list[int], pooling: Pooling) -> Tensor:
    hidden = hidden_of(model, prompt)
    return torch.nn.functional.normalize(hidden[-1] if pooling is Pooling.LAST else hidden.mean(0), dim=0)


def assert_scores(model: PreTrainedModel, wish: Wish, found: list[ScoredToken]) -> None:
    logprobs = logits_of(model, wish.prompt).log_softmax(-1)
    assert [scored.token_id for scored in found] == wish.prompt[1:]
    count = wish.sampling.num_prompt_logprobs
    assert count is not None
    for scored, row in zip(found, logprobs, strict=False):
        assert scored.logprob == pytest.approx(float(row[scored.token_id]), abs=1e-4)
        best = row.topk(count)
        assert [a.logprob for a in scored.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [a.token_id for a in scored.alternatives] == best.indices.tolist()


def scored_wishes() -> list[Wish]:
    """Scored with and without alternatives, only scored, and others that are not scored at all."""
    return [
        Wish(
            prompt_ids(length, seed=length),
            num_tokens=[6, 0, 3][i % 3],
            sampling=SamplingParams(temperature=0.0, num_prompt_logprobs=[0, 3, 20][i % 3]),
        )
        for i, length in enumerate(LENGTHS)
    ] + [Wish(prompt_ids(11, seed=1), 12), Wish(prompt_ids(30, seed=2), 5)]


def check_scored(rig: ModelRig, wishes: list[Wish], model: PreTrainedModel, *, is_staggered: bool) -> None:
    answers = rig.generate(wishes, is_staggered=is_staggered)
    for number, (wish, answer) in enumerate(zip(wishes, answers, strict=True)):
        assert len(answer) == wish.num_tokens
        assert answer == greedy_choices(model, wish.prompt, answer)
        if wish.sampling.num_prompt_logprobs is None:
            assert rig.scores(number) == []
        else:
            assert_scores(model, wish, rig.scores(number))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_logprobs_are_those_of_transformers(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model, loaded, wishes = original(folder), load_tiny(folder), scored_wishes()
    check_scored(make_model_rig(loaded), wishes, model, is_staggered=True)
    whole = make_model_rig(loaded, step_tokens=1000, prefix_caching=True)
    check_scored(whole, wishes, model, is_staggered=False)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_logprobs_do_not_depend_on_cache_or_preemption(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model, loaded, wishes = original(folder), load_tiny(folder), scored_wishes()
    cached = make_model_rig(loaded, prefix_caching=True)
    for _ in range(2):
        check_scored(cached, wishes, model, is_staggered=True)
    cramped = make_model_rig(loaded, num_blocks=13, step_tokens=32)
    longer = [replace(wish, num_tokens=16) for wish in wishes]
    check_scored(cramped, longer, model, is_staggered=True)
    assert sum(stats.preemptions for stats in cramped.stats) > 0


def test_logits_of_a_prompt_are_computed_in_slices(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    sizes: list[int] = []
    score = prompt_reader.score

    def counting(logits: Tensor, ids: Tensor, count: int) -> Tensor:
        sizes.append(len(logits))
        return score(logits, ids, count)

    monkeypatch.setattr(prompt_reader, "score", counting)
    monkeypatch.setattr(prompt_reader, "SLICE_NUMBERS", 7 * VOCAB_SIZE)
    rig = make_model_rig(load_tiny(folder), step_tokens=1000)
    wish = Wish(prompt_ids(40, seed=1), 2, sampling=SamplingParams(temperature=0.0, num_prompt_logprobs=1))
    check_scored(rig, [wish], original(folder), is_staggered=False)
    assert sizes == [7, 7, 7, 7, 7, 4]


def pooled_wishes(adapter: AdapterRef | None = None) -> list[Wish]:
    """Pooled in both ways, some with the adapter, beside some that generate."""
    pooled = [
        Wish(prompt_ids(length, seed=length), 0, pooling=pooling, adapter=ref)
        for length in LENGTHS
        for pooling in Pooling
        for ref in ((None, adapter) if adapter else (None,))
    ]
    return [*pooled, Wish(prompt_ids(11, seed=1), 12), Wish(prompt_ids(30, seed=2), 5, adapter=adapter)]


def check_pooled(
    rigs: Iterable[ModelRig], wishes: list[Wish], model_of: dict[AdapterRef | None, PreTrainedModel]
) -> None:
    """A loaded model is that of the rig that was made last: each is made when the one before is done."""
    expected = [
        greedy(model_of[wish.adapter], wish.prompt, wish.num_tokens)
        if wish.pooling is None
        else vector_of(model_of[wish.adapter], wish.prompt, wish.pooling)
        for wish in wishes
    ]
    for rig in rigs:
        for is_staggered in (True, False):
            answers = rig.generate(wishes, is_staggered=is_staggered)
            for number, (answer, right) in enumerate(zip(answers, expected, strict=True)):
                if isinstance(right, list):
                    assert answer == right
                    continue
                found = torch.tensor(rig.vector(number))
                torch.testing.assert_close(found, right, rtol=0, atol=2e-5)
                assert float(found.norm()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_pooled_hidden_states_of_transformers(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    loaded, models = load_tiny(folder), {None: original(folder)}
    settings: list[dict[str, Any]] = [{}, {"step_tokens": 1000, "prefix_caching": True}]
    check_pooled((make_model_rig(loaded, **chosen) for chosen in settings), pooled_wishes(), models)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_vectors_and_scores_with_an_adapter_are_those_of_peft(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        target_modules=["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
    )
    adapted = get_peft_model(original(folder), config).eval()
    adapted.save_pretrained(tmp_path)
    loaded = load_tiny(folder)
    weights = load_weights(tmp_path, loaded.targets, loaded.dtype, 1 << 30)
    ref = AdapterRef("a", weights.revision)
    base = original(folder)
    far = vector_of(base, prompt_ids(23, seed=23), Pooling.MEAN) - vector_of(
        adapted, prompt_ids(23, seed=23), Pooling.MEAN
    )
    assert float(far.norm()) > 0.05, "an adapter without effect: no test"
    rigs = (
        make_model_rig(loaded, adapters={ref: weights}, prefix_caching=prefix_caching)
        for prefix_caching in (False, True)
    )
    check_pooled(rigs, pooled_wishes(ref), {None: base, ref: adapted})
    scored = Wish(
        prompt_ids(23, seed=23),
        3,
        adapter=ref,
        sampling=SamplingParams(temperature=0.0, num_prompt_logprobs=2),
    )
    rig = make_model_rig(loaded, adapters={ref: weights})
    assert rig.generate([scored, Wish(scored.prompt, 9)])[0] == greedy(adapted, scored.prompt, 3)
    assert_scores(adapted, scored, rig.scores(0))


def test_steps_of_vectors_alone_compute_no_logits(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny(checkpoint("llama"))
    head = model.module.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda *args: pytest.fail("the output matrix was used"))
    rig = make_model_rig(model)
    rig.generate(
        [Wish(prompt_ids(n, seed=n), 0, sampling=GREEDY, pooling=p) for n in (5, 20) for p in Pooling]
    )
    assert [len(rig.vector(number)) for number in range(4)] == [64] * 4


@pytest.mark.parametrize("pooling", Pooling)
def test_hidden_states_that_are_not_finite_fail_their_sequence(
    pooling: Pooling, checkpoint: Checkpoint
) -> None:
    model = load_tiny(checkpoint("llama"))
    with torch.no_grad():
        model.module.get_input_embeddings().weight[7] = float("nan")
    rig = make_model_rig(model, step_tokens=1000)
    with pytest.raises(AssertionError, match="not a number"):
        rig.generate([Wish([5, 6, 7], 0, pooling=pooling)])
