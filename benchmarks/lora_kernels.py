"""What adapters add to a step: milliseconds over all linear layers of a model's shape, and as a share of
the base's.

    python -m benchmarks.lora_kernels                     decode, 16 rows, Qwen2.5-0.5B shape, bfloat16
    python -m benchmarks.lora_kernels --rows 512 --spans 3 --adapters 3     a prefill chunk

"native" is our own kernel, "torch" computes adapter by adapter. The best of many repetitions is printed: on
a busy machine the mean measures the others.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters.batch import LoraBatch
from adapters.device import HostArena
from adapters.kernels import LoraKernel, pick
from adapters.kernels.native.compiled import INSTRUCTION_SETS
from adapters.types import AdapterRef, AdapterUse, AdapterWrite, LoraEntry, Revision, TargetId
from adapters.weights import LoraWeights
from server.model.cpu_kernels import pick_kernels
from server.model.packed_linear import pack_linear

_WARM_UP = 3  # steps


@dataclass(frozen=True, slots=True)
class Shape:
    """The linear layers of a decoder layer, (in, out) each."""

    linears: tuple[tuple[int, int], ...]
    num_layers: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the table."""

    way: str
    num_adapters: int
    ranks: str
    rows: int
    ms: float
    share_of_base: float
    adapter_mb: float


def llama_shape(hidden: int, inner: int, kv: int, num_layers: int) -> Shape:
    """q, k, v, o, gate, up and down."""
    attention = ((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden))
    return Shape((*attention, (hidden, inner), (hidden, inner), (inner, hidden)), num_layers)


def targets_of(shape: Shape) -> Iterator[tuple[TargetId, int, int]]:
    width = len(shape.linears)
    for layer in range(shape.num_layers):
        for index, (num_in, num_out) in enumerate(shape.linears):
            yield TargetId(layer * width + index), num_in, num_out


def random_adapter(
    targets: Iterable[tuple[TargetId, int, int]], name: str, rank: int, dtype: torch.dtype
) -> LoraWeights:
    """On all of these linear layers, (number, in, out) each."""
    entries, end = {}, 0
    for target, num_in, num_out in targets:
        entries[target] = LoraEntry(rank, num_in, num_out, end, end + rank * num_in)
        end += rank * (num_in + num_out)
    run = (torch.randn(end) * 0.02).to(dtype)
    return LoraWeights(Revision(name), run, entries, rank, ("linear",), run.nbytes)


def base_step(shape: Shape, rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """All linear layers of the base model, as the server lays them out."""
    modules: list[nn.Module] = []
    layouts = pick_kernels("auto", dtype).layouts
    with torch.inference_mode():
        for _, num_in, num_out in targets_of(shape):
            linear = nn.Linear(num_in, num_out, bias=False, dtype=dtype)
            modules.append(pack_linear(linear, layouts, is_checked=True) or linear)
    inputs = {num_in: torch.randn(rows, num_in).to(dtype) for num_in, _ in shape.linears}
    sizes = [num_in for _, num_in, _ in targets_of(shape)]

    def run() -> None:
        for module, num_in in zip(modules, sizes, strict=True):
            module(inputs[num_in])

    return run


def adapter_step(
    shape: Shape,
    adapters: Sequence[LoraWeights],
    kernel: LoraKernel,
    rows: int,
    spans: int,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """What the wrapped layers add; `spans` sequences with equal shares of the rows, adapters taking turns."""
    arena = HostArena(kernel)
    for weights in adapters:
        ref = AdapterRef(weights.revision, weights.revision)
        arena.write(AdapterWrite(ref, 0, weights.num_bytes), weights)
    uses = [AdapterUse.of(AdapterRef(weights.revision, weights.revision)) for weights in adapters]
    plan = [(uses[i % len(uses)], rows // spans) for i in range(spans)]
    num_tokens = sum(count for _, count in plan)
    inputs = {num_in: torch.randn(num_tokens, num_in).to(dtype) for num_in, _ in shape.linears}
    outputs: dict[int, Tensor] = {
        num_out: torch.randn(num_tokens, num_out).to(dtype) for _, num_out in shape.linears
    }
    targets = list(targets_of(shape))

    def run() -> None:
        batch = LoraBatch.build(arena, plan)
        assert batch is not None
        for target, num_in, num_out in targets:
            batch.add_lora(outputs[num_out], inputs[num_in], target)

    return run


def side_by_side(base: Callable[[], None], step: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Best of the base and of the adapters, in milliseconds. They take turns, so that noise meets both."""
    with torch.inference_mode():
        times = [(_timed_ms(base), _timed_ms(step)) for _ in range(_WARM_UP + repeats)]
    best_base, best_step = (min(column) for column in zip(*times[_WARM_UP:], strict=True))
    return best_base, best_step


def _timed_ms(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def measure(options: argparse.Namespace) -> list[Measurement]:
    """Every number of adapters, both kinds of ranks, both ways."""
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    shape = llama_shape(options.hidden, options.inner, options.kv, options.layers)
    scale = options.count_layers / options.layers
    spans = options.spans or options.rows
    base = base_step(shape, options.rows, dtype)
    results = []
    for ranks, name in (([16], "16"), ([8, 16, 32, 64], "8..64")):
        for count in options.adapters:
            adapters = [
                random_adapter(targets_of(shape), f"a{i}", ranks[i % len(ranks)], dtype) for i in range(count)
            ]
            for way in ("native", "torch"):
                kernel = pick(torch.device("cpu"), dtype, native=INSTRUCTION_SETS if way == "native" else ())
                step = adapter_step(shape, adapters, kernel, options.rows, spans, dtype)
                base_ms, best = (value * scale for value in side_by_side(base, step, options.repeats))
                num_bytes = sum(weights.num_bytes for weights in adapters) * scale
                results.append(
                    Measurement(way, count, name, options.rows, best, best / base_ms, num_bytes / 1e6)
                )
                print(
                    f"{way:7s} {count:3d} adapters of rank {name:6s} {best:7.1f} ms {best / base_ms:6.1%} of"
                    f" {base_ms:.1f}  ({num_bytes / 1e6:.0f} MB)",
                    flush=True,
                )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--inner", type=int, default=4864)
    parser.add_argument("--kv", type=int, default=128, help="output size of k and v")
    parser.add_argument("--layers", type=int, default=12, help="layers to measure")
    parser.add_argument("--count-layers", type=int, default=24, help="layers to report for")
    parser.add_argument("--rows", type=int, default=16, help="tokens of the step")
    parser.add_argument("--spans", type=int, default=0, help="sequences that share the rows; 0: one row each")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = measure(options)
    if options.json is not None:
        report = {
            "threads": options.threads,
            "dtype": options.dtype,
            "torch": torch.__version__,
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
