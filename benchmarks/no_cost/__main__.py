"""What serving costs when the model costs nothing.

For each number of streams the engine runs alone first, then with that many HTTP streams on it; once flat out
and once with a fixed time a step. Reported are token events a second, how late the server's event loop is,
how much slower the engine's steps come with streams attached, and how long /health takes meanwhile. Then, if
the steps are paced, a client that does nothing but receive tells how long each token took to its socket.

    python -m benchmarks.no_cost --streams 64 256
"""

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.lag import lag_sampler
from benchmarks.metrics import Spread, spread
from benchmarks.no_cost.added import added_latencies, arrivals
from benchmarks.no_cost.receiver import Piece
from benchmarks.no_cost.runner import NoCostRunner
from benchmarks.no_cost.stack import MODEL, Size, make_runner, make_tokenizer, run_alone, serving
from benchmarks.report import columns, write_json
from server.text.tokenizer import Tokenizer

ROUNDS = 3  # requests a stream: the later ones meet a server that is fully loaded
RAMP_S = 2.0  # streams that begin together end together, and so on: nobody's users do that


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. Seconds, except where the name says otherwise; NaN where the batch was never full."""

    streams: int
    step_ms: float  # what the runner takes by itself
    tokens_per_s: float  # while the batch was full
    cpu_per_token: float  # of the server process, all threads; hardly depends on who else is on the machine
    alone_period: float  # from one step to the next, engine alone
    served_period: float  # ... and with streams
    loop_lag_p50: float
    loop_lag_p99: float
    health_p50: float
    health_p99: float
    chunks_per_s: float  # at the client; fewer than tokens where a late loop joins them
    first_token_p50: float  # at the client
    first_token_p99: float  # at the client
    gap_p99: float  # at the client
    client_lag_p99: float
    added_latency_p50: float  # from the end of a token's step to the socket of a client; NaN flat out
    added_latency_p99: float
    failed: int

    @property
    def slowdown(self) -> float:
        return self.served_period / self.alone_period - 1


async def measure(tokenizer: Tokenizer, size: Size, step_s: float, ramp_s: float = RAMP_S) -> Row:
    alone = make_runner(tokenizer, step_s)
    await asyncio.to_thread(run_alone, alone, size)
    runner = make_runner(tokenizer, step_s)
    async with serving(runner, tokenizer, size) as port:
        health = await _start_python("benchmarks.no_cost.health", "127.0.0.1", str(port), pipes=True)
        async with lag_sampler() as lags:
            began = time.process_time()
            level = await _load(port, size, ramp_s)
            cpu_s = time.process_time() - began
        answer, _ = await health.communicate(b"")  # closes its input, which ends it
        tokens_per_s, served_period = runner.tokens_per_s(size.streams), runner.period_s(size.streams)
        # Flat out the engine is as far ahead as it may be: the queue between them is all that would be seen.
        added = await _added_latency(port, runner, tokenizer, size, ramp_s) if step_s else spread(())
    asked = json.loads(answer)
    summary = level["summary"]
    lag = spread(lags)
    return Row(
        streams=size.streams,
        step_ms=step_s * 1e3,
        tokens_per_s=tokens_per_s,
        cpu_per_token=cpu_s / max(1, summary["output_tokens"]),
        alone_period=alone.period_s(size.streams),
        served_period=served_period,
        loop_lag_p50=lag.p50,
        loop_lag_p99=lag.p99,
        health_p50=asked["p50"],
        health_p99=asked["p99"],
        chunks_per_s=(summary["gap"]["count"] + summary["ttft"]["count"]) / summary["wall"],
        first_token_p50=summary["ttft"]["p50"],
        first_token_p99=summary["ttft"]["p99"],
        gap_p99=summary["gap"]["p99"],
        client_lag_p99=level["client_lag"]["p99"],
        added_latency_p50=added.p50,
        added_latency_p99=added.p99,
        failed=sum(count for _, count in summary["failures"]),
    )


async def _load(port: int, size: Size, ramp_s: float) -> dict[str, Any]:
    """`motet bench` in a process of its own; its one level."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "run.json"
        client = await _start_python(
            "benchmarks.cli",
            *("--url", f"http://127.0.0.1:{port}", "--api", "completions", "--json", str(result)),
            *("--concurrency", str(size.streams), "--requests", str(ROUNDS * size.streams)),
            *("--ramp", str(ramp_s)),
            *("--prompt-tokens", str(size.prompt_tokens), "--output-tokens", str(size.output_tokens)),
        )
        if await client.wait() != 0:
            raise SystemExit("the load could not be put on: see above")
        level: dict[str, Any] = json.loads(result.read_text())["levels"][0]
        return level


async def _added_latency(
    port: int, runner: NoCostRunner, tokenizer: Tokenizer, size: Size, ramp_s: float
) -> Spread:
    """The same load once more, from a client that does nothing but receive, and nobody else asks."""
    num_before = len(runner.marks)
    receiver = await _start_python(
        "benchmarks.no_cost.receiver",
        *("--port", str(port), "--model", MODEL),
        *("--streams", str(size.streams), "--rounds", str(ROUNDS), "--ramp-s", str(ramp_s)),
        *("--prompt-tokens", str(size.prompt_tokens), "--output-tokens", str(size.output_tokens)),
        pipes=True,
    )
    answer, _ = await receiver.communicate()
    if receiver.returncode != 0:
        raise SystemExit("the streams could not be received: see above")
    lengths = [len(tokenizer.token_text(token_id)) for token_id in runner.token_ids]
    ends = list(accumulate(lengths[i % len(lengths)] for i in range(size.output_tokens)))
    came = [arrivals([Piece(**piece) for piece in pieces], ends) for pieces in json.loads(answer)]
    return spread(added_latencies(runner.marks[num_before:], came, size.streams))


async def _start_python(module: str, *arguments: str, pipes: bool = False) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE if pipes else asyncio.subprocess.DEVNULL
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdin=pipe, stdout=pipe
    )


def table(rows: Sequence[Row]) -> str:
    """One column a measurement."""

    def ms(value: float) -> str:
        return _or_dash(value * 1e3, ".2f")

    lines: list[tuple[str, list[str]]] = [
        ("", [f"{row.streams} streams" for row in rows]),
        ("runner takes, ms a step", [f"{row.step_ms:g}" for row in rows]),
        ("token events/s", [_or_dash(row.tokens_per_s, ",.0f") for row in rows]),
        ("server CPU, us a token", [f"{row.cpu_per_token * 1e6:.0f}" for row in rows]),
        ("engine alone, ms a step", [ms(row.alone_period) for row in rows]),
        ("with streams, ms a step", [ms(row.served_period) for row in rows]),
        ("the step is longer by", [_or_dash(row.slowdown, "+.0%") for row in rows]),
        ("event-loop lag p50, ms", [ms(row.loop_lag_p50) for row in rows]),
        ("event-loop lag p99, ms", [ms(row.loop_lag_p99) for row in rows]),
        ("/health p50, ms", [ms(row.health_p50) for row in rows]),
        ("/health p99, ms", [ms(row.health_p99) for row in rows]),
        ("client: chunks/s over all", [f"{row.chunks_per_s:,.0f}" for row in rows]),
        ("client: first token p50, ms", [ms(row.first_token_p50) for row in rows]),
        ("client: first token p99, ms", [ms(row.first_token_p99) for row in rows]),
        ("client: inter-token p99, ms", [ms(row.gap_p99) for row in rows]),
        ("client: own lag p99, ms", [ms(row.client_lag_p99) for row in rows]),
        ("added latency p50, ms", [ms(row.added_latency_p50) for row in rows]),
        ("added latency p99, ms", [ms(row.added_latency_p99) for row in rows]),
        ("failed requests", [str(row.failed) for row in rows]),
    ]
    return "\n".join(columns(lines))


def _or_dash(value: float, form: str) -> str:
    """A batch that was never full has no numbers."""
    return "-" if math.isnan(value) else format(value, form)


async def run(args: argparse.Namespace) -> list[Row]:
    tokenizer = make_tokenizer()
    rows = []
    for streams in args.streams:
        for step_ms in args.step_ms:
            size = Size(streams, args.prompt_tokens, args.output_tokens)
            rows.append(await measure(tokenizer, size, step_ms / 1e3))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.no_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument(
        "--step-ms", type=float, nargs="+", default=[0.0, 20.0], help="the runner's time a step"
    )
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    rows = asyncio.run(run(args))
    print(table(rows))
    if args.json:
        write_json(args.json, {"machine": machine.describe(), "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
