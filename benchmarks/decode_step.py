"""How long the device side takes: prefill and decode of a checkpoint, as shares of the machine's best.

Runs the real `ModelRunner` on made-up prompts, without scheduler, thread or server, so what it shows is
model, paged attention, adapters and sampler alone. The best possible is that of `floor`.

    python -m benchmarks.decode_step DIR/model
    python -m benchmarks.decode_step DIR/model --batch 1 16 --context 1000 --top-p 0.9 --profile
    python -m benchmarks.decode_step DIR/model --batch 16 --adapters 16 --rank 16
"""

import argparse
import statistics
import sys
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import get_args

import torch
from torch.profiler import ProfilerActivity, profile

from adapters.device import make_arena
from adapters.types import AdapterRef, AdapterUse, AdapterWrite, TargetId, TargetKind
from adapters.weights import LoraWeights
from benchmarks.floor import Cost, Load, Machine, cost_of, floor_of
from benchmarks.lora_kernels import random_adapter
from benchmarks.roofline import measure_products, measure_read
from server.engine.kv_cache import KVCache
from server.engine.model_runner import ModelRunner
from server.engine.plan import ScheduledChunk, StepPlan
from server.engine.sequence import Sequence, SequenceId
from server.model.cpu_kernels import CacheChoice, KernelChoice, Quantization, native_instructions
from server.model.loader import LoadedModel, load_model
from server.types import SamplingParams, StopCriteria

BLOCK_SIZE = 16
PROFILED_STEPS = 5


class Bench:
    """Sequences of equal length on one runner."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_batch: int,
        max_tokens: int,
        sampling: SamplingParams,
        cpu_kernels: KernelChoice = "auto",
        adapters: Items[LoraWeights] = (),
    ) -> None:
        """Sequences take turns with the adapters; without any they use the base model."""
        self._model = model
        self._sampling = sampling
        self._blocks = -(-max_tokens // BLOCK_SIZE)
        kv = KVCache(
            model.layers,
            model.attention,
            num_blocks=self._blocks * max_batch,
            block_size=BLOCK_SIZE,
            dtype=model.dtype,
            device=model.device,
        )
        native = native_instructions(cpu_kernels)
        arena = make_arena(
            model.device,
            max(1 << 20, sum(weights.num_bytes for weights in adapters)),
            model.dtype,
            native=native,
        )
        weights_of = {weights.revision: weights for weights in adapters}
        self._runner = ModelRunner(model, kv, arena, weights_of.__getitem__)
        writes, offset = [], 0
        for weights in adapters:
            ref = AdapterRef(weights.revision, weights.revision)
            writes.append(AdapterWrite(ref, offset, weights.num_bytes))
            offset += weights.num_bytes
        self._runner.run(StepPlan((), writes=tuple(writes)))
        self._uses = [AdapterUse.of(write.ref) for write in writes]

    def sequences(self, batch: int, context: int) -> list[Sequence]:
        generator = torch.Generator().manual_seed(batch * context)
        prompts = torch.randint(0, self._model.vocab_size, (batch, context), generator=generator).tolist()
        return [
            Sequence(
                id=SequenceId(i),
                tokens=prompt,
                num_prompt=context,
                sampling=self._sampling,
                stop=StopCriteria(max_tokens=1 << 30),
                seed=i,
                adapter=self._uses[i % len(self._uses)] if self._uses else None,
                arrival=0.0,
                # every batch-th block: neighbours in a sequence are not neighbours in memory
                block_table=list(range(i, self._blocks * batch, batch)),
            )
            for i, prompt in enumerate(prompts)
        ]

    def step(self, sequences: Items[Sequence], num_tokens: int | None = None) -> float:
        """Give each sequence `num_tokens`, or what it lacks; the seconds it took."""
        chunks = []
        for item in sequences:
            share = item.num_tokens - item.num_computed
            chunks.append(ScheduledChunk(item, item.num_computed, min(share, num_tokens or share)))
        began = perf_counter()
        output = self._runner.run(StepPlan(tuple(chunks)))
        took = perf_counter() - began
        drawn = {token.id: token.token_id for token in output.tokens}
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
            if chunk.sequence.id in drawn:
                chunk.sequence.tokens.append(drawn[chunk.sequence.id])
        return took

    def prefill(self, sequences: Items[Sequence], budget: int) -> float:
        """One after the other in chunks of `budget` tokens; seconds."""
        return sum(
            self.step([item], budget) for item in sequences for _ in range(-(-item.num_tokens // budget))
        )


def adapters_for(model: LoadedModel, count: int, rank: int) -> list[LoraWeights]:
    """Noise on every linear layer of the decoder."""
    linears = [
        (TargetId(i), target.in_features, target.out_features)
        for i, target in enumerate(model.targets.targets)
        if target.kind == TargetKind.LINEAR
    ]
    return [random_adapter(linears, f"a{i}", rank, model.dtype) for i in range(count)]


def main(argv: Items[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    began = perf_counter()
    model = load_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        progress=_silent,
        cpu_kernels=options.cpu_kernels,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
    )
    print(
        f"{options.model}: {model.num_parameters / 1e6:.0f} M parameters in {model.dtype} on {model.device},",
        end=" ",
    )
    print(f"{torch.get_num_threads()} threads, loaded in {perf_counter() - began:.1f} s")
    print(f"kernels: {model.kernels}")
    machine = Machine(measure_read(model.device), measure_products(model.device, model.dtype))
    print(f"machine: {machine.read_bytes_per_s / 1e9:.1f} GB/s, {machine.operations_per_s / 1e9:.0f} GFLOP/s")
    sampling = SamplingParams(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k)
    tokens = options.context + options.steps + 2 + PROFILED_STEPS
    adapters = adapters_for(model, options.adapters, options.rank)
    bench = Bench(
        model,
        max_batch=max(options.batch),
        max_tokens=tokens,
        sampling=sampling,
        cpu_kernels=options.cpu_kernels,
        adapters=adapters,
    )
    cost = cost_of(options.model)
    if adapters:
        cost = replace(cost, adapter_bytes=adapters[0].run.nbytes, adapter_weights=adapters[0].run.numel())
    print("batch  context   prefill tok/s  of floor   step ms (min, median)  of floor   tok/s")
    for batch in options.batch:
        _report(bench, batch, machine, cost, options)
    return 0


def _report(bench: Bench, batch: int, machine: Machine, cost: Cost, options: argparse.Namespace) -> None:
    floor = floor_of(machine, cost, Load(batch, options.context, options.steps, options.adapters))
    sequences = bench.sequences(batch, options.context)
    prefill_s = bench.prefill(sequences, options.budget)
    times = [bench.step(sequences) for _ in range(options.steps)]
    best, median = min(times), statistics.median(times)
    rate = batch * options.context / prefill_s
    print(
        f"{batch:5d} {options.context:8d} {rate:15.0f} {floor.prefill_s / prefill_s:8.0%}"
        f" {best * 1e3:14.1f} {median * 1e3:8.1f} {floor.step_s / median:9.0%} {batch / median:8.1f}"
    )
    if options.profile:
        watched = [ProfilerActivity.CPU]
        by = "self_cpu_time_total"
        if options.device == "cuda":
            watched.append(ProfilerActivity.CUDA)
            by = "self_cuda_time_total"
        with profile(activities=watched) as profiler:
            for _ in range(PROFILED_STEPS):
                bench.step(sequences)
        print(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=44))


def _silent(stage: str, fraction: float) -> None:
    """Loading is not what is looked at."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode_step", description="Time the device side alone."
    )
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-kernels", default="auto", choices=get_args(KernelChoice))
    parser.add_argument("--quantization", default="none", choices=get_args(Quantization))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=get_args(CacheChoice))
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=200, help="prompt tokens of each sequence")
    parser.add_argument("--steps", type=int, default=40, help="decode steps that are timed")
    parser.add_argument("--budget", type=int, default=512, help="most prompt tokens in one step")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument(
        "--adapters", type=int, default=0, help="of noise, that the sequences take turns with"
    )
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
