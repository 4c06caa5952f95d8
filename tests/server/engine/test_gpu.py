"""The same parity on a CUDA device. Skipped unless asked for with -m gpu."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters.types import AdapterRef
from adapters.weights import load_weights
from server.engine.kv_cache import kv_bytes_per_block, num_kv_blocks
from server.model.memory import default_kv_bytes
from server.types import Pooling, SamplingParams
from tests.server.kinds_of_adapters import train_all, with_row_tokens
from tests.server.model_rig import DRAWN, GREEDY, Checkpoint, Wish, load_tiny, make_model_rig
from tests.server.tiny_models import greedy, original, prompt_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

FAMILIES = ["llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt-oss", "deepseek-v3", "mixtral", "gpt2"]
LENGTHS = (1, 5, 23, 40, 9)

ROWS = (
    GREEDY,
    DRAWN,
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=20),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.05),
    SamplingParams(typical_p=0.6),
    SamplingParams(temperature=0.0, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.2),
    SamplingParams(temperature=0.0, logit_bias=((17, 4.0), (18, -4.0))),
    SamplingParams(temperature=0.0, num_logprobs=0),
    SamplingParams(temperature=1.1, num_logprobs=5),
    SamplingParams(temperature=0.0, num_prompt_logprobs=3),
)
"""One row of each kind that the sampler treats in its own way."""


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """float32 means float32: no TF32 in products. By hand: these objects compute their attributes, which
    monkeypatch would delete instead of putting them back.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def wishes(num_tokens: int = 16) -> list[Wish]:
    return [Wish(prompt_ids(n, seed=n), num_tokens, seed=n) for n in LENGTHS]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_on_the_device_are_those_of_transformers(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    expected = [greedy(original(folder), wish.prompt, wish.num_tokens) for wish in wishes()]
    model = load_tiny(folder, device="cuda")
    assert make_model_rig(model).generate(wishes()) == expected
    assert make_model_rig(model, step_tokens=1000).generate(wishes(), is_staggered=False) == expected
    assert make_model_rig(model, num_blocks=13, step_tokens=32).generate(wishes()) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_adapters_on_the_device_answer_as_peft_does(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
    )
    adapted = get_peft_model(original(folder), config).eval()
    adapted.save_pretrained(tmp_path)
    model = load_tiny(folder, device="cuda")
    weights = load_weights(tmp_path, model.targets, model.dtype, 1 << 30)
    ref = AdapterRef("a", weights.revision)
    mixed = [
        Wish(wish.prompt, wish.num_tokens, adapter=ref if i % 2 else None) for i, wish in enumerate(wishes())
    ]
    expected = [
        greedy(adapted if wish.adapter else original(folder), wish.prompt, wish.num_tokens) for wish in mixed
    ]
    assert make_model_rig(model, adapters={ref: weights}).generate(mixed) == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_every_kind_of_adapter_on_the_device_answers_as_peft_does(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    model = load_tiny(folder, device="cuda")
    trained = train_all(lambda: original(folder), family, tmp_path)
    loaded = {
        name: load_weights(one.folder, model.targets, model.dtype, 1 << 30, model.weights)
        for name, one in trained.items()
    }
    prompt = with_row_tokens(prompt_ids(19, seed=1))
    mixed = [Wish(prompt, 8, adapter=AdapterRef(name, weights.revision)) for name, weights in loaded.items()]
    expected = [greedy(one.model, prompt, 8) for one in trained.values()]
    adapters = {AdapterRef(name, weights.revision): weights for name, weights in loaded.items()}
    assert make_model_rig(model, adapters=adapters).generate(mixed) == expected
    largest = max(weights.num_bytes for weights in adapters.values())
    cramped = make_model_rig(model, adapters=adapters, arena_bytes=2 * largest, step_tokens=1000)
    assert cramped.generate(mixed) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_runs_on_the_device(family: str, checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint(family), dtype="bfloat16", device="cuda")
    wanted = [*wishes(), Wish(prompt_ids(30, seed=1), 16, sampling=DRAWN, seed=3)]
    answers = make_model_rig(model).generate(wanted)
    assert [len(answer) for answer in answers] == [16] * len(wanted)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float32"), ("gemma2", "float32"), ("gpt-oss", "bfloat16")]
)
def test_step_waits_for_the_device_only_to_read_the_ids(
    family: str, dtype: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode and prefill, rows of every kind: nothing but the sampler's own reads synchronises.

    Experts are multiplied by torch's grouped product, which in float32 itself reads the groups' sizes.
    """
    folder = checkpoint(family)
    model = load_tiny(folder, dtype=dtype, device="cuda")
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(original(folder), config).save_pretrained(tmp_path)
    weights = load_weights(tmp_path, model.targets, model.dtype, 1 << 30)
    adapters = {AdapterRef("a", weights.revision): weights}
    wanted = [
        Wish(prompt_ids(10 + 3 * i, seed=i), 6, adapter=ref, sampling=sampling, seed=i)
        for ref in (None, *adapters)
        for i, sampling in enumerate(ROWS)
    ]
    expected = make_model_rig(model, adapters=adapters).generate(wanted)  # also warms up
    rig = make_model_rig(model, adapters=adapters)
    with only_reads_synchronise(monkeypatch):
        answers = rig.generate(wanted)
        together = rig.generate(wanted, is_staggered=False)
    if dtype == "float32":
        assert answers == together == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_prompts_on_the_device_are_scored_and_pooled_as_on_the_cpu(
    family: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside rows that generate, in chunks and whole, waiting for nothing but the numbers that are told."""
    folder = checkpoint(family)
    scored = SamplingParams(temperature=0.0, num_prompt_logprobs=3)
    wanted = [
        *(Wish(prompt_ids(n, seed=n), 2, sampling=scored) for n in LENGTHS),
        *(Wish(prompt_ids(n, seed=n), 0, pooling=pooling) for n in LENGTHS for pooling in Pooling),
        *wishes(6),
    ]
    on_cpu = make_model_rig(load_tiny(folder))
    expected = on_cpu.generate(wanted)
    model = load_tiny(folder, device="cuda")
    make_model_rig(model).generate(wanted)  # warms up
    for step_tokens in (7, 1000):
        rig = make_model_rig(model, step_tokens=step_tokens)
        with only_reads_synchronise(monkeypatch):
            assert rig.generate(wanted) == expected
        for number, wish in enumerate(wanted):
            if wish.pooling is not None:
                assert rig.vector(number) == pytest.approx(on_cpu.vector(number), abs=1e-4)
                continue
            found, right = rig.scores(number), on_cpu.scores(number)
            assert [s.token_id for s in found] == [s.token_id for s in right]
            assert [s.logprob for s in found] == pytest.approx([s.logprob for s in right], abs=1e-3)


@contextmanager
def only_reads_synchronise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any wait for the device raises, but for `tolist`."""
    allowed = torch.Tensor.tolist

    def read(tensor: torch.Tensor) -> object:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return allowed(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        patched.setattr(torch.Tensor, "tolist", read)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_default_budget_is_a_share_of_the_device(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("llama"), device="cuda")
    free, total = torch.cuda.mem_get_info()
    budget = default_kv_bytes(model.device, gpu_memory_utilization=0.5)
    assert 0 <= budget <= min(free + (64 << 20), total // 2)
    assert default_kv_bytes(model.device, gpu_memory_utilization=0.0) == 0
    per_block = kv_bytes_per_block(model.layers, model.attention, 16, model.dtype)
    assert num_kv_blocks(budget, per_block, 16, max_model_len=256, max_num_seqs=4) == 64
