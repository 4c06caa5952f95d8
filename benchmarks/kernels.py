"""Each of our own kernels as a share of what this machine can do: its bytes and operations by its time.

    python -m benchmarks.kernels                         the sizes of Qwen2.5-0.5B, bfloat16
    python -m benchmarks.kernels --dtype float32
    python -m benchmarks.kernels --instructions avx2     as on a CPU without AVX-512

A kernel is limited by the memory or by arithmetic, whichever takes longer at the measured peaks; the share is
that time by the one that it took. Weights are those of as many layers as no cache holds. The best of many
repetitions counts: on a busy machine the mean measures the others.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from adapters.kernels.native.bindings import NativeLora
from adapters.kernels.native.compiled import INSTRUCTION_SETS, InstructionSet
from adapters.kernels.native.kernel import NativeKernel
from benchmarks.floor import Machine
from benchmarks.lora_kernels import adapter_step, llama_shape, random_adapter, targets_of
from benchmarks.roofline import measure_products, measure_read
from benchmarks.trial import as_record, publish
from server.model.attention import LayerSpec
from server.model.native.attention import NativeAttention
from server.model.native.bindings import NativeKernels, load_kernels
from server.model.native.structures import SCALE_BYTES, SequenceRow

HIDDEN, INNER, HEADS, KV_HEADS, DIM = 896, 4864, 14, 2, 64
BLOCK_SIZE = 16
CACHE_BLOCKS = 16_384  # 134 MB in bfloat16


@dataclass(frozen=True, slots=True)
class Line:
    """What a kernel did. Milliseconds."""

    kernel: str
    work: str
    ms: float
    gb_per_s: float
    gflop_per_s: float
    share: float  # of what the machine can do


@dataclass(frozen=True, slots=True)
class Task:
    kernel: str
    work: str
    run: Callable[[], object]
    num_bytes: float
    operations: float
    operations_per_s: float  # the peak for its kind of numbers


def measured(task: Task, machine: Machine, repeats: int) -> Line:
    best = float("inf")
    for _ in range(repeats + 2):
        began = perf_counter()
        task.run()
        best = min(best, perf_counter() - began)
    least = max(task.num_bytes / machine.read_bytes_per_s, task.operations / task.operations_per_s)
    return Line(
        task.kernel,
        task.work,
        best * 1e3,
        task.num_bytes / best / 1e9,
        task.operations / best / 1e9,
        least / best,
    )


def linear_tasks(kernels: NativeKernels, peak: float, num_layers: int) -> Iterator[Task]:
    """All linear layers, one after the other; of 8 bits at twice the rate of bfloat16, as the chip has it."""
    shape = llama_shape(HIDDEN, INNER, KV_HEADS * DIM, num_layers)
    sizes = [(num_in, num_out) for _, num_in, num_out in targets_of(shape)]
    count = sum(num_in * num_out for num_in, num_out in sizes)
    weights = [torch.randn(num_out, num_in).to(kernels.dtype) * 0.02 for num_in, num_out in sizes]
    packed = [kernels.pack(weight) for weight in weights]
    quantized = {bits: [kernels.quantize(weight, bits) for weight in weights] for bits in (8, 4)}
    rate = peak * (2 if kernels.dtype is torch.bfloat16 else 4)
    for rows in (1, 4, 16, 64, 256):
        inputs = {num_in: torch.randn(rows, num_in).to(kernels.dtype) for num_in in (HIDDEN, INNER)}

        def as_they_are(inputs: dict[int, Tensor] = inputs) -> None:
            for weight, (num_in, num_out) in zip(packed, sizes, strict=True):
                kernels.linear(inputs[num_in], weight, None, num_out)

        def of_few_bits(bits: int, inputs: dict[int, Tensor] = inputs) -> None:
            for weight, (num_in, num_out) in zip(quantized[bits], sizes, strict=True):
                kernels.linear_quantized(inputs[num_in], weight, None, num_out)

        what, operations = f"{rows} row{'s' if rows > 1 else ''}", 2.0 * rows * count
        yield Task("linear", what, as_they_are, count * kernels.dtype.itemsize, operations, peak)
        yield Task("linear, 8 bits", what, partial(of_few_bits, 8), count, operations, rate)
        yield Task("linear, 4 bits", what, partial(of_few_bits, 4), count * 4.5 / 8, operations, rate)


def attention_tasks(kernels: NativeKernels, peak: float) -> Iterator[Task]:
    """One layer's attention: sequences decode, or a prompt is read. Each time over other blocks of a cache
    that fits nowhere.
    """
    for sequences, queries, keys in ((1, 1, 8192), (16, 1, 1024), (1, 512, 512), (1, 512, 4096)):
        steps = attention_steps(kernels.dtype, sequences, queries, keys)
        pairs = sequences * (queries * (keys - queries) + queries * (queries + 1) / 2)
        for has_bytes in (False, True):
            row_bytes = DIM + SCALE_BYTES if has_bytes else DIM * kernels.dtype.itemsize
            yield Task(
                "attention, 8 bits" if has_bytes else "attention",
                f"{sequences} x {queries} queries, {keys} keys",
                partial(attend, kernels, cache_of(kernels, has_bytes), cycle(steps)),
                2.0 * sequences * keys * KV_HEADS * row_bytes,
                4.0 * HEADS * DIM * pairs,
                peak,
            )


@dataclass(frozen=True, slots=True)
class AttentionStep:
    operands: tuple[Tensor, Tensor, Tensor]  # q, k, v [heads, tokens, DIM]
    places: Tensor
    sequences: Tensor
    blocks: Tensor


def attention_steps(dtype: torch.dtype, sequences: int, queries: int, keys: int) -> list[AttentionStep]:
    """No two of them read the same block."""
    tokens, per_sequence = sequences * queries, -(-keys // BLOCK_SIZE)
    q, k, v = (
        torch.randn(tokens, heads, DIM).to(dtype).transpose(0, 1) for heads in (HEADS, *[KV_HEADS] * 2)
    )
    rows = torch.tensor([SequenceRow(i * queries, queries, keys, i * per_sequence) for i in range(sequences)])
    order = torch.randperm(CACHE_BLOCKS, generator=torch.Generator().manual_seed(0))
    new = torch.arange(keys - queries, keys)
    count = len(order) // (sequences * per_sequence)
    steps = []
    for tables in order[: count * sequences * per_sequence].view(count, sequences, per_sequence):
        places = tables[:, new // BLOCK_SIZE] * BLOCK_SIZE + new % BLOCK_SIZE
        steps.append(AttentionStep((q, k, v), places.flatten(), rows.flatten(), tables.flatten()))
    return steps


def cache_of(kernels: NativeKernels, has_bytes: bool) -> list[Tensor]:
    """Filled with 60: four such bytes are a scale of 0.0115."""
    attention = NativeAttention(kernels, has_bytes=has_bytes)
    shapes = attention.shapes(LayerSpec(KV_HEADS, DIM, DIM, None, None), CACHE_BLOCKS, BLOCK_SIZE)
    return [torch.full(shape, 60, dtype=attention.cache_dtype(kernels.dtype)) for shape in shapes]


def attend(kernels: NativeKernels, cache: Sequence[Tensor], turns: Iterator[AttentionStep]) -> None:
    step = next(turns)
    keys, values = cache
    kernels.attend(
        *step.operands,
        keys,
        values,
        step.places,
        step.sequences,
        step.blocks,
        window=None,
        scale=DIM**-0.5,
    )


def lora_tasks(
    dtype: torch.dtype, peak: float, num_layers: int, among: Sequence[InstructionSet]
) -> Iterator[Task]:
    """What adapters of rank 16 add to all linear layers."""
    shape = llama_shape(HIDDEN, INNER, KV_HEADS * DIM, num_layers)
    for count, rows in ((1, 1), (16, 16), (4, 16), (1, 256)):
        adapters = [random_adapter(targets_of(shape), f"a{i}", 16, dtype) for i in range(count)]
        kernel = NativeKernel(NativeLora(dtype, among))
        step = adapter_step(shape, adapters, kernel, rows, min(rows, count), dtype)
        numbers = adapters[0].run.numel()
        yield Task(
            "adapters",
            f"{count} of rank 16, {rows} rows",
            step,
            float(count * numbers * dtype.itemsize),
            2.0 * rows * numbers,
            peak,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description="Our own kernels as shares of the machine."
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--instructions", choices=INSTRUCTION_SETS, help="default: the best that there are")
    parser.add_argument("--layers", type=int, default=12, help="whose weights are taken (default: 12)")
    parser.add_argument("--repeats", type=int, default=15, help="of each; the best counts (default: 15)")
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    among = (args.instructions,) if args.instructions else INSTRUCTION_SETS
    kernels = load_kernels(dtype, among, beside_amx=True)
    cpu = torch.device("cpu")
    machine = Machine(measure_read(cpu), measure_products(cpu, dtype))
    peak = machine.operations_per_s
    lines = []
    with torch.inference_mode():
        for tasks in (
            linear_tasks(kernels, peak, args.layers),
            attention_tasks(kernels, peak),
            lora_tasks(dtype, peak, args.layers, among),
        ):
            lines += [measured(task, machine, args.repeats) for task in tasks]
    rows = [
        ("", ["", "ms", "GB/s", "GFLOP/s", "of the machine"]),
        *(
            (
                line.kernel,
                [
                    line.work,
                    f"{line.ms:.2f}",
                    f"{line.gb_per_s:.1f}",
                    f"{line.gflop_per_s:.0f}",
                    f"{line.share:.0%}",
                ],
            )
            for line in lines
        ),
    ]
    read, products = machine.read_bytes_per_s / 1e9, peak / 1e9
    notes = [f"the machine: {read:.1f} GB/s, {products:.0f} GFLOP/s, {torch.get_num_threads()} threads"]
    publish(args, rows, {"floor": as_record(machine), "kernels": [as_record(line) for line in lines]}, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
