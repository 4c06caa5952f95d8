"""A real engine on a tiny model: core, scheduler, paged cache, arena and runner as the server wires them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapters.device import make_arena
from adapters.kernels.native.compiled import INSTRUCTION_SETS
from adapters.placement import AdapterPlacement
from adapters.types import AdapterRef, AdapterUse
from adapters.weights import LoraWeights
from server.engine.blocks import BlockPool
from server.engine.core import EngineCore
from server.engine.kv_cache import KVCache
from server.engine.model_runner import ModelRunner
from server.engine.plan import Add, ScoredToken, SequenceOutput, StepStats
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import SequenceId
from server.model.cpu_kernels import CacheChoice, KernelChoice, Quantization
from server.model.loader import LoadedModel, load_model
from server.types import FinishReason, Pooling, SamplingParams, StopCriteria
from tests.fakes import used

Checkpoint = Callable[[str], Path]
"""The fixture `checkpoint`: from a family of tiny_models to the folder that holds it."""

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(
    temperature=1.3, top_k=80, top_p=0.95, min_p=0.001, repetition_penalty=1.1, frequency_penalty=0.1
)


def pairwise(families: Sequence[str]) -> list[tuple[str, str, KernelChoice]]:
    """Families with dtypes and kernels of our own: each two of them meet, all three do not."""
    halves: list[tuple[tuple[str, KernelChoice], ...]] = [
        (("bfloat16", "native"), ("float32", "avx2")),
        (("float32", "native"), ("bfloat16", "avx2")),
    ]
    return [(family, *rest) for number, family in enumerate(families) for rest in halves[number % 2]]


def fill_with_nan(cache: Tensor) -> None:
    """Of one in eight bits the scales are what is not a number."""
    cache.view(torch.int8).fill_(-1)


@dataclass(frozen=True, slots=True)
class Wish:
    """One request of a test."""

    prompt: list[int]
    num_tokens: int
    adapter: AdapterRef | AdapterUse | None = None
    sampling: SamplingParams = GREEDY
    seed: int = 0
    pooling: Pooling | None = None
    adapter_start: int = 0


@dataclass(slots=True)
class ModelRig:
    core: EngineCore
    stats: list[StepStats] = field(default_factory=list)
    news: list[list[SequenceOutput]] = field(default_factory=list)  # of each wish, of the last `generate`

    def generate(self, wishes: Sequence[Wish], *, is_staggered: bool = True) -> list[list[int]]:
        """What each wish gets. Staggered: one more arrives before each step, so that
        chunks and decode rows mix.
        """
        arriving = [
            Add(
                SequenceId(i),
                tuple(wish.prompt),
                wish.sampling,
                StopCriteria(max_tokens=wish.num_tokens, ignore_eos=True),
                wish.seed,
                used(wish.adapter),
                wish.pooling,
                adapter_start=wish.adapter_start,
            )
            for i, wish in enumerate(wishes)
        ]
        tokens: list[list[int]] = [[] for _ in wishes]
        self.stats.clear()
        self.news = [[] for _ in wishes]
        while arriving or self.core.has_work:
            for add in arriving[: 1 if is_staggered else None]:
                self.core.handle(add)
            arriving = arriving[1:] if is_staggered else []
            output = self.core.step()
            assert output is not None
            self.stats.append(output.stats)
            for news in output.outputs:
                assert news.finish in (None, FinishReason.LENGTH), news.error
                self.news[news.id].append(news)
                if news.token is not None:
                    tokens[news.id].append(news.token.token_id)
        for wish, answer in zip(wishes, tokens, strict=True):
            assert len(answer) == (0 if wish.pooling else wish.num_tokens)
        return tokens

    def scores(self, number: int) -> list[ScoredToken]:
        """What was told of the prompt of a wish."""
        return [scored for news in self.news[number] for scored in news.scores]

    def vector(self, number: int) -> list[float]:
        """What the prompt of a wish has become."""
        vector = self.news[number][-1].vector
        assert vector is not None
        return list(vector)


def load_tiny(
    folder: Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    cpu_kernels: KernelChoice = "auto",
    block_size: int = 8,
    quantization: Quantization = "none",
    kv_cache_dtype: CacheChoice = "auto",
) -> LoadedModel:
    """For a rig with blocks of that size. Our own attention kernels want 16."""
    return load_model(
        folder,
        dtype=dtype,
        device=device,
        progress=lambda stage, fraction: None,
        cpu_kernels=cpu_kernels,
        block_size=block_size,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
    )


def make_model_rig(
    model: LoadedModel,
    *,
    block_size: int = 8,
    num_blocks: int = 100,
    step_tokens: int = 7,
    prefix_caching: bool = False,
    adapters: Mapping[AdapterRef, LoraWeights] | None = None,
    arena_bytes: int = 1 << 22,
    prefetches: bool = False,
    native_adapters: bool = True,
) -> ModelRig:
    """`step_tokens` is the budget of a step. The cache begins full of NaN: nothing unwritten may be read."""
    kv = KVCache(
        model.layers,
        model.attention,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=model.dtype,
        device=model.device,
    )
    for cache in (*kv.keys, *kv.values):
        fill_with_nan(cache)
    weights = {ref.revision: held for ref, held in (adapters or {}).items()}
    clock = SteppingClock()
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size, enable_prefix_caching=prefix_caching),
        AdapterPlacement(arena_bytes),
        lambda ref: weights[ref.revision].num_bytes,
        SchedulerLimits(max_num_seqs=16, max_num_batched_tokens=step_tokens, prefetches=prefetches),
        clock,
    )
    arena = make_arena(
        model.device, arena_bytes, model.dtype, native=INSTRUCTION_SETS if native_adapters else ()
    )
    runner = ModelRunner(model, kv, arena, lambda revision: weights[revision])
    return ModelRig(EngineCore(scheduler, runner, clock, model.eos_token_ids, model.max_position))


class SteppingClock:
    """A clock that advances by a millisecond with every look."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        self._now += 0.001
        return self._now
