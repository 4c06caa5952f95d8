"""What the runner does beyond arithmetic: order, isolation of bad rows, and what it answers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.batch import LoraBatch
from adapters.device import HostArena, make_arena
from adapters.types import AdapterRef, AdapterWrite, Revision
from server.engine.kv_cache import KVCache
from server.engine.model_runner import ModelRunner
from server.engine.plan import ScheduledChunk, StepPlan
from server.engine.sequence import Sequence, SequenceId
from server.model.loader import LoadedModel
from server.types import SamplingParams, StopCriteria
from tests.adapters.making import host_arena, made_weights, use_of
from tests.server.model_rig import Checkpoint, load_tiny
from tests.server.tiny_models import greedy, prompt_ids

BLOCK = 8


@pytest.fixture
def folder(checkpoint: Checkpoint) -> Path:
    return checkpoint("llama")


@pytest.fixture
def model(folder: Path) -> LoadedModel:
    return load_tiny(folder)


def sequence(number: int, tokens: list[int], **sampling: float) -> Sequence:
    blocks = -(-(len(tokens) + 8) // BLOCK)
    return Sequence(
        id=SequenceId(number),
        tokens=list(tokens),
        num_prompt=len(tokens),
        sampling=SamplingParams(**{"temperature": 0.0, **sampling}),  # type: ignore[arg-type]
        stop=StopCriteria(max_tokens=9),
        seed=number,
        adapter=None,
        arrival=0.0,
        block_table=[10 * number + i for i in range(blocks)],
    )


def cache(model: LoadedModel) -> KVCache:
    return KVCache(
        model.layers,
        model.attention,
        num_blocks=64,
        block_size=BLOCK,
        dtype=model.dtype,
        device=model.device,
    )


def make_runner(model: LoadedModel, kv: KVCache | None = None) -> ModelRunner:
    arena = make_arena(model.device, 1 << 16, model.dtype)
    return ModelRunner(
        model, kv or cache(model), arena, lambda revision: pytest.fail("no adapter was written")
    )


def whole(item: Sequence) -> ScheduledChunk:
    return ScheduledChunk(item, 0, item.num_tokens)


def test_only_sequences_that_reach_their_last_token_are_answered(model: LoadedModel) -> None:
    part, full = sequence(1, prompt_ids(9, seed=1)), sequence(2, prompt_ids(5, seed=2))
    output = make_runner(model).run(StepPlan((ScheduledChunk(part, 0, 4), whole(full))))
    assert [token.id for token in output.tokens] == [full.id]
    assert output.failed == ()


def test_step_in_which_nobody_samples_answers_nothing(model: LoadedModel) -> None:
    item = sequence(1, prompt_ids(9, seed=1))
    output = make_runner(model).run(StepPlan((ScheduledChunk(item, 0, 4),)))
    assert (output.tokens, output.failed) == ((), ())


def test_logprobs_are_those_of_the_model(model: LoadedModel, folder: Path) -> None:
    prompt = prompt_ids(7, seed=3)
    item = sequence(1, prompt, num_logprobs=2)
    (token,) = make_runner(model).run(StepPlan((whole(item),))).tokens
    original = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.inference_mode():
        expected = original(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert [a.token_id for a in token.alternatives] == expected.topk(2).indices.tolist()


def test_poisoned_sequence_fails_alone_and_leaves_no_poison_behind(model: LoadedModel, folder: Path) -> None:
    kv = cache(model)
    runner = make_runner(model, kv)
    prompt = prompt_ids(11, seed=4)
    poisoned, healthy = sequence(0, prompt), sequence(1, prompt)
    runner.run(StepPlan((whole(poisoned), whole(healthy))))
    for item in (poisoned, healthy):
        item.tokens.append(5)
    kv.values[0][: BLOCK * 3] = float("nan")  # the blocks of the first
    output = runner.run(StepPlan(tuple(ScheduledChunk(item, 11, 1) for item in (poisoned, healthy))))
    assert output.failed == (poisoned.id,)
    assert [token.id for token in output.tokens] == [healthy.id]
    heir = sequence(0, prompt)  # gets the same blocks, full of NaN
    (token,) = runner.run(StepPlan((whole(heir),))).tokens
    heir.tokens.append(token.token_id)
    (second,) = runner.run(StepPlan((ScheduledChunk(heir, 11, 1),))).tokens
    original = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert [token.token_id, second.token_id] == greedy(original, prompt, 2)


class LoggingArena(HostArena):
    """Notes what it is told; adapters without weights are enough for that."""

    def __init__(self, arena: HostArena) -> None:
        super().__init__(arena.kernel)
        self.log: list[tuple[str, str, object]] = []

    def evict(self, ref: AdapterRef) -> None:
        self.log.append(("evict", ref.name, None))

    def write(self, write: AdapterWrite, weights: object) -> None:
        self.log.append(("write", write.ref.name, weights))

    def prefetch(self, write: AdapterWrite, weights: object) -> None:
        self.log.append(("prefetch", write.ref.name, weights))


def test_adapters_leave_before_others_come_and_only_new_ones_bring_weights(model: LoadedModel) -> None:
    host = make_arena(model.device, 1 << 16, model.dtype)
    assert isinstance(host, HostArena)
    arena = LoggingArena(host)
    old, new, moved, next_one = (
        AdapterRef(name, Revision(f"r-{name}")) for name in ("old", "new", "moved", "next")
    )
    runner = ModelRunner(model, cache(model), arena, lambda revision: f"weights of {revision}")  # type: ignore[arg-type, return-value]
    writes = (AdapterWrite(moved, 0, 64, moved_from=64), AdapterWrite(new, 64, 64))
    item = sequence(1, prompt_ids(3, seed=1))
    prefetches = (AdapterWrite(next_one, 128, 64),)
    runner.run(StepPlan((whole(item),), evictions=(old,), writes=writes, prefetches=prefetches))
    assert arena.log == [
        ("evict", "old", None),
        ("write", "moved", None),
        ("write", "new", "weights of r-new"),
        ("prefetch", "next", "weights of r-next"),
    ]


def test_step_without_sequences_only_places_adapters(model: LoadedModel) -> None:
    host = make_arena(model.device, 1 << 16, model.dtype)
    assert isinstance(host, HostArena)
    arena = LoggingArena(host)
    pinned, next_one = (AdapterRef(name, Revision(f"r-{name}")) for name in ("pinned", "next"))
    runner = ModelRunner(model, cache(model), arena, lambda revision: f"weights of {revision}")  # type: ignore[arg-type, return-value]
    plan = StepPlan((), writes=(AdapterWrite(pinned, 0, 64),), prefetches=(AdapterWrite(next_one, 64, 64),))
    assert runner.run(plan).tokens == ()
    assert arena.log == [
        ("write", "pinned", "weights of r-pinned"),
        ("prefetch", "next", "weights of r-next"),
    ]


def test_prefetch_of_what_is_gone_is_left_out_and_told(model: LoadedModel) -> None:
    host = make_arena(model.device, 1 << 16, model.dtype)
    assert isinstance(host, HostArena)
    arena = LoggingArena(host)
    weights = {Revision("r-here"): "weights of here"}
    runner = ModelRunner(model, cache(model), arena, weights.__getitem__)  # type: ignore[arg-type]
    here, gone = (AdapterRef(name, Revision(f"r-{name}")) for name in ("here", "gone"))
    plan = StepPlan(
        (whole(sequence(1, prompt_ids(3, seed=1))),),
        prefetches=(AdapterWrite(gone, 0, 64), AdapterWrite(here, 64, 64)),
    )
    output = runner.run(plan)
    assert output.lost == (gone.revision,)
    assert len(output.tokens) == 1
    assert arena.log == [("prefetch", "here", "weights of here")]


def test_step_leaves_nothing_on_the_context_even_if_it_fails(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(model)
    item = sequence(1, prompt_ids(3, seed=1))
    runner.run(StepPlan((whole(item),)))
    assert model.context.batch is None
    batch = LoraBatch.build(host_arena([made_weights("a", {0: (2, 64, 64)})]), [(use_of("a"), 3)])
    monkeypatch.setattr(LoraBatch, "build", lambda arena, rows: batch)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.module, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.run(StepPlan((whole(item),)))
    assert model.context.batch is None
    assert model.lora.batch is None
    assert model.lora.head is None


def test_two_engines_on_one_process_do_not_know_each_other(folder: Path) -> None:
    first, second = (make_runner(load_tiny(folder)) for _ in range(2))
    prompts = [prompt_ids(9, seed=seed) for seed in (1, 2)]
    both = [
        runner.run(StepPlan((whole(sequence(1, p)),)))
        for runner, p in zip((first, second), prompts, strict=True)
    ]
    alone = [make_runner(load_tiny(folder)).run(StepPlan((whole(sequence(1, p)),))) for p in prompts]
    assert both == alone
