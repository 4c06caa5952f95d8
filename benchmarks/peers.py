"""Other servers beside this one: the same load from the same client, by turns, on one machine.

    python -m benchmarks.peers bench/model --adapters bench/adapters --runs 3 --json peers.json \\
        --peer vllm 'vllm serve bench/model --served-model-name base --port {port}' \\
        --adapters-peer vllm 'vllm serve bench/model --port {port} --enable-lora --lora-modules ...'

A run starts each server once, waits until it answers, looks at it while nobody asks for anything, puts the
loads on it one after the other, and stops it. Each run begins with another server. What is printed are the
medians of the runs, and what they are of ours. A peer that needs other flags for adapters is named twice.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from time import perf_counter

import aiohttp
import torch

from benchmarks.floor import Load, Machine, cost_of, floor_of
from benchmarks.metrics import summarize
from benchmarks.options import Options, parse
from benchmarks.probe import NotReady, find
from benchmarks.roofline import measure_products, measure_read
from benchmarks.run import measure
from benchmarks.serving import ROOT
from benchmarks.trial import as_record, median, publish

OURS = "motet"
START_S = 180.0
STOP_S = 60.0
IDLE_S = 5.0
EVERY = ("--api", "completions", "--extra", '{"ignore_eos": true, "temperature": 0}', "--wait", str(START_S))
LOADS = {
    "1 stream": ("--concurrency", "1", "--requests", "5"),
    "4 streams": ("--concurrency", "4", "--requests", "12"),
    "16 streams": ("--concurrency", "16", "--requests", "32"),
    "712 tokens": ("--concurrency", "1", "--requests", "5", "--prompt-tokens", "712"),
    "712 tokens, 512 shared": ("--concurrency", "1", "--requests", "5", "--shared-prefix", "512"),
}
ADAPTER_LOADS = {
    "16 adapters": ("--concurrency", "16", "--requests", "32", "--adapters", "all", "--mix", "distinct"),
}
MANY_LOADS = {
    "many adapters": ("--concurrency", "16", "--requests", "64", "--adapters", "all", "--mix", "zipf"),
}
ALL_LOADS = {**LOADS, **ADAPTER_LOADS, **MANY_LOADS}


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    command: str  # for a shell, with {port}
    loads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """What a server is before anybody asks it for anything."""

    server: str
    ready_s: float
    idle_share: float  # of one core
    resident_bytes: int  # of all its processes; a page that they share counts for each


@dataclass(frozen=True, slots=True)
class Figure:
    """What a load found."""

    server: str
    load: str
    output_tokens_per_s: float
    first_token_s: float  # median
    token_s: float  # after the first, median
    failed: int


class Processes:
    """A server's process group."""

    def __init__(self, group: int) -> None:
        self._group = group

    def cpu_s(self) -> float:
        ticks = sum(int(fields[11]) + int(fields[12]) for fields in self._stats())
        return ticks / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        return sum(int(fields[21]) for fields in self._stats()) * os.sysconf("SC_PAGE_SIZE")

    def _stats(self) -> Iterator[list[str]]:
        """The fields of /proc/PID/stat from the state on."""
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = file.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self._group:
                    yield fields


@asynccontextmanager
async def started(server: Server, log: Path) -> AsyncIterator[tuple[str, Processes]]:
    """Its address and its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("ab") as words:
        process = await asyncio.create_subprocess_shell(
            server.command.replace("{port}", str(port)),
            cwd=ROOT,
            stdout=words,
            stderr=words,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}", Processes(process.pid)
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_S)


async def _first_answer(url: str) -> None:
    """Returns when the server has answered a request. Raises NotReady."""
    async with aiohttp.ClientSession() as session:
        target = await find(session, url, None, START_S)
        body = {"model": target.model, "prompt": "a", "max_tokens": 1}
        async with session.post(f"{target.url}/v1/completions", json=body) as response:
            if response.status != HTTPStatus.OK:
                raise NotReady(f"The server at {url} answers {response.status} to a completion of one token.")


async def run(server: Server, args: argparse.Namespace, number: int) -> tuple[Start, list[Figure]]:
    async with started(server, args.log) as (url, processes):
        began = perf_counter()
        await _first_answer(url)
        ready_s = perf_counter() - began
        before = processes.cpu_s()
        await asyncio.sleep(IDLE_S)
        start = Start(server.name, ready_s, (processes.cpu_s() - before) / IDLE_S, processes.resident_bytes())
        figures = []
        for load in server.loads:
            measured = await measure(_options(url, ALL_LOADS[load], seed_of(load, number)))
            if not measured.levels:
                raise NotReady(f"{server.name} answered nothing; see {args.log}")
            level = measured.levels[0]
            found = summarize(level.shots, level.wall)
            figures.append(
                Figure(
                    server.name,
                    load,
                    found.output_tokens_per_s,
                    found.ttft.p50,
                    found.per_token.p50,
                    found.failed,
                )
            )
            print(
                f"{number + 1}: {server.name}, {load}: {found.output_tokens_per_s:.1f} tokens/s,"
                f" first {found.ttft.p50 * 1e3:.0f} ms, then {found.per_token.p50 * 1e3:.1f} ms",
                flush=True,
            )
        return start, figures


def seed_of(load: str, number: int) -> int:
    """The same prompts for all servers of a run, and others for each load: else a prefix cache would know the
    beginnings of a later load's.
    """
    return number * len(ALL_LOADS) + list(ALL_LOADS).index(load)


def _options(url: str, load: Sequence[str], seed: int) -> Options:
    return parse([*EVERY, "--url", url, "--seed", str(seed), *load])


async def measure_all(
    servers: Sequence[Server], args: argparse.Namespace
) -> tuple[list[Start], list[Figure]]:
    starts: list[Start] = []
    figures: list[Figure] = []
    for number in range(args.runs):
        first = number % len(servers)
        for server in (*servers[first:], *servers[:first]):
            start, found = await run(server, args, number)
            starts.append(start)
            figures += found
    return starts, figures


def servers_of(args: argparse.Namespace) -> list[Server]:
    with_adapters = tuple(ADAPTER_LOADS) if args.adapters else ()
    base = tuple(load for load in LOADS if load in args.loads)

    def ours(adapters: Path | None) -> str:
        folder = [] if adapters is None else ["--adapters-dir", str(adapters)]
        words = [sys.executable, "-m", "server", "serve", str(args.model), *folder, *args.flags]
        return f"exec {shlex.join(words)} --port {{port}}"

    return [
        Server(OURS, ours(args.adapters), (*base, *with_adapters)),
        *([Server(OURS, ours(args.many_adapters), tuple(MANY_LOADS))] if args.many_adapters else []),
        *(Server(name, command, base) for name, command in args.peer),
        *(Server(name, command, with_adapters) for name, command in args.adapters_peer),
    ]


def table(
    figures: Sequence[Figure], args: argparse.Namespace, machine: Machine
) -> list[tuple[str, list[str]]]:
    """A line for each load and server."""
    rows = [("", ["server", "tokens/s", "of ours", "of the floor", "first token, ms", "then, ms", "failed"])]
    adapters = sorted(path for path in args.adapters.iterdir() if path.is_dir()) if args.adapters else []
    for load, words in ALL_LOADS.items():
        options = _options("http://127.0.0.1", words, 0)
        users, shared = options.concurrency[0], options.shared_prefix
        is_known = not shared and load not in MANY_LOADS  # what a step reads depends on who is in it
        mine = adapters if options.adapters and is_known else []
        cost = cost_of(args.model, mine)
        floor = floor_of(
            machine, cost, Load(users, shared + options.prompt_tokens, options.output_tokens, len(mine))
        )
        by_server: dict[str, list[Figure]] = {}
        for figure in figures:
            if figure.load == load:
                by_server.setdefault(figure.server, []).append(figure)
        ours = median([figure.output_tokens_per_s for figure in by_server.get(OURS, [])])
        for name, found in by_server.items():
            rate = median([figure.output_tokens_per_s for figure in found])
            rows.append(
                (
                    load,
                    [
                        name,
                        f"{rate:.1f}",
                        f"{rate / ours:.2f}",
                        "" if not is_known else f"{rate / floor.output_tokens_per_s:.0%}",
                        f"{median([figure.first_token_s for figure in found]) * 1e3:.0f}",
                        f"{median([figure.token_s for figure in found]) * 1e3:.1f}",
                        str(sum(figure.failed for figure in found)),
                    ],
                )
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Other servers beside this one, by turns."
    )
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="folder of adapters, a stream for each")
    parser.add_argument(
        "--many-adapters", type=Path, metavar="DIR", help="folder of more, of which some are asked for often"
    )
    for flag, meaning in (("--peer", "a server without adapters"), ("--adapters-peer", "a server with them")):
        parser.add_argument(
            flag, nargs=2, action="append", default=[], metavar=("NAME", "COMMAND"), help=meaning
        )
    parser.add_argument("--flags", type=shlex.split, default=[], metavar="'...'", help="more flags for ours")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), metavar="LOAD")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="what the servers say")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    args = parser.parse_args(argv)
    cpu = torch.device("cpu")
    machine = Machine(measure_read(cpu), measure_products(cpu, torch.bfloat16))
    starts, figures = asyncio.run(measure_all(servers_of(args), args))
    read, products = machine.read_bytes_per_s / 1e9, machine.operations_per_s / 1e9
    notes = [f"the machine: {read:.1f} GB/s, {products:.0f} GFLOP/s"]
    for name in dict.fromkeys(start.server for start in starts):
        mine = [start for start in starts if start.server == name]
        notes.append(
            f"{name}: ready in {median([s.ready_s for s in mine]):.1f} s,"
            f" idle {median([s.idle_share for s in mine]):.1%} of a core,"
            f" {median([s.resident_bytes for s in mine]) / 2**20:.0f} MiB"
        )
    result = {
        "floor": as_record(machine),
        "starts": [as_record(start) for start in starts],
        "figures": [as_record(figure) for figure in figures],
    }
    publish(args, table(figures, args, machine), result, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
