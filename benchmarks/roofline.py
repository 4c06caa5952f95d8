"""What this machine can do at best, and what that makes of a checkpoint: the floor that results are shares
of.

Bandwidth is measured by summing a buffer far larger than any cache, arithmetic by multiplying square
matrices; the best of several tries counts, since the question is what is possible. What follows from the two
numbers is `floor`'s.

    python -m benchmarks.roofline                          the machine alone
    python -m benchmarks.roofline DIR/model --adapters DIR/adapters
    python -m benchmarks.roofline DIR/model --result run.json      a run of motet bench as shares of its floor
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from adapters import pages
from benchmarks.floor import Cost, Load, Machine, cost_of, floor_of
from server.model.cpu_kernels import pick_kernels
from server.model.packed_linear import pack_linear

TRIES = 7
CPU_BUFFER_BYTES = 2**30
CUDA_BUFFER_BYTES = 2**33
CPU_SIDE = 768  # the inputs of some rows stay in L1: it is the peak that is looked for
CUDA_SIDE = 8192


def best_s(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of several runs, the first of which is not counted."""
    took = []
    for _ in range(TRIES + 1):
        began = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(perf_counter() - began)
    return min(took[1:])


def measure_read(device: torch.device) -> float:
    """Bytes a second that a reduction reads, on a CPU out of pages like those that weights lie in."""
    if device.type == "cuda":
        buffer = torch.zeros(CUDA_BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    else:
        buffer = pages.zeros(CPU_BUFFER_BYTES // 4, torch.float32)
    buffer.fill_(1.0)  # nobody has touched them yet
    return buffer.nbytes / best_s(buffer.sum, device)


def measure_products(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, by torch or by what the server takes instead."""
    side = CUDA_SIDE if device.type == "cuda" else CPU_SIDE
    x = torch.randn(side, side, device=device).to(dtype)
    with torch.inference_mode():
        layer = nn.Linear(side, side, bias=False, device=device, dtype=dtype)
        ways: list[nn.Module] = [layer]
        if device.type == "cpu":
            packed = pack_linear(layer, pick_kernels("auto", dtype).layouts, is_checked=True)
            ways += [] if packed is None else [packed]
        return 2 * side**3 / min(best_s(partial(way, x), device) for way in ways)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    read = measure_read(device)
    products = {name: measure_products(device, getattr(torch, name)) for name in ("bfloat16", "float32")}
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{args.device}{threads}: reads {read / 1e9:.1f} GB/s", end="")
    print("".join(f", {name} {rate / 1e9:.0f} GFLOP/s" for name, rate in products.items()))
    if args.model is None:
        return 0
    machine = Machine(read, products[args.dtype])
    folders = (
        sorted(path.parent for path in args.adapters.glob("*/adapter_model.safetensors"))
        if args.adapters
        else []
    )
    cost = cost_of(args.model, folders)
    _print_model(args.model, machine, cost)
    loads = list(_results(args.result)) if args.result else []
    if not loads:
        loads = [
            (Load(users, args.prompt_tokens, args.output_tokens, len(folders)), "", None)
            for users in args.concurrency
        ]
    rows = list(_print_floors(machine, cost, loads))
    if args.json:
        record = {"machine": asdict(machine), "cost": asdict(cost), "floors": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _print_model(path: Path, machine: Machine, cost: Cost) -> None:
    step_s = cost.step_bytes / machine.read_bytes_per_s
    print(
        f"{path}: a step reads {cost.step_bytes / 1e9:.3f} GB, so at least {step_s * 1e3:.1f} ms a token",
        end="",
    )
    print(f" and at most {1 / step_s:.0f} tokens/s for one user")


def _print_floors(
    machine: Machine, cost: Cost, loads: Sequence[tuple[Load, str, float | None]]
) -> Iterator[dict[str, object]]:
    print(
        f"{'users':>5} {'adapters':>8} {'tokens':>10} {'prefill ms':>10} {'step ms':>8} {'tokens/s':>9}",
        end="",
    )
    print(f" {'measured':>9} {'share':>6}  run" if any(label or rate for _, label, rate in loads) else "")
    for load, label, measured in loads:
        floor = floor_of(machine, cost, load)
        tokens = f"{load.prompt_tokens}+{load.output_tokens}"
        print(f"{load.users:>5} {load.adapters:>8} {tokens:>10} {floor.prefill_s * 1e3:>10.1f}", end="")
        print(f" {floor.step_s * 1e3:>8.2f} {floor.output_tokens_per_s:>9.1f}", end="")
        share = None if measured is None else measured / floor.output_tokens_per_s
        print("" if share is None else f" {measured:>9.1f} {share:>6.0%}  {label}")
        yield {**asdict(load), **asdict(floor), "measured": measured, "share": share, "label": label}


def _results(files: Sequence[Path]) -> Iterator[tuple[Load, str, float | None]]:
    """The closed-loop levels of motet bench's JSON files, with the tokens/s they reached."""
    for file in files:
        run = json.loads(file.read_text())
        about = run["load"]
        adapters = {name for name in about["adapters"] if name != "__base_model__"}
        num_adapters = min(len(adapters), 1) if about["mix"] == "one" else len(adapters)
        prompt_tokens = about["prompt_tokens"] + about["shared_prefix"]
        for level in run["levels"]:
            if "concurrency" in level:
                load = Load(level["concurrency"], prompt_tokens, about["output_tokens"], num_adapters)
                yield load, run["label"] or file.stem, level["summary"]["output_tokens_per_s"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n")[0])
    parser.add_argument(
        "model", type=Path, nargs="?", help="checkpoint folder; without it, the machine alone"
    )
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="folder of PEFT folders that are in use")
    parser.add_argument("--result", type=Path, nargs="+", metavar="FILE", help="JSON files of motet bench")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the arithmetic"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
