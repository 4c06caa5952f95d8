"""Does a tenant who floods the server starve one who asks politely?

Tenant B sends one request a second on its own adapter: alone first, then while tenant A has put 200 requests
on another adapter at once, until the last of them is answered. Each way of being fair gets a server of its
own; the first token is counted from when B's request left. B is a process of its own: a client that has 200
requests to send is busy with them for some fifty milliseconds, which are not the server's.

    python -m benchmarks.flood --fair-by adapter off --json flood.json
"""

import argparse
import asyncio
import itertools
import math
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Event

from benchmarks.adapter_folders import write_adapters
from benchmarks.client import Client, open_session
from benchmarks.metrics import percentile
from benchmarks.probe import token_counter
from benchmarks.prompts import Prompter, calibrate
from benchmarks.records import Shot, Target, Wish
from benchmarks.serving import WIRE, Site, serving
from benchmarks.trial import as_record, median, model_flags, model_folder, ms, parser_of, publish, workplace


@dataclass(frozen=True, slots=True)
class Run:
    """B's figures under one way of being fair. Seconds."""

    fair_by: str
    alone_p50: float
    alone_p95: float
    alone: int  # requests
    beside_p50: float
    beside_p95: float
    beside_worst: float
    beside: int  # requests that B sent while A's were there
    flood_s: float  # from A's first request to the end of its last
    errors: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return self.beside_p95 / self.alone_p95


@dataclass(frozen=True, slots=True)
class Polite:
    """What B's process is told."""

    target: Target
    prompter: Prompter
    adapter: str
    prompt_tokens: int
    output_tokens: int
    every_s: float


def ask_politely(polite: Polite, key: str, begin: Event, end: Event) -> list[Shot]:
    """In B's process: ask one request after the other at fixed times from `begin` to `end`."""

    async def ask() -> list[Shot]:
        async with open_session(WIRE) as session:
            client = Client(session, polite.target, WIRE)
            wishes = _wishes(polite.prompter, polite.adapter, polite.prompt_tokens, polite.output_tokens, key)
            is_over = asyncio.Event()
            await asyncio.to_thread(begin.wait)
            watching = asyncio.create_task(asyncio.to_thread(end.wait))
            watching.add_done_callback(lambda _: is_over.set())
            return await ask_steadily(client, wishes, polite.every_s, is_over)

    return asyncio.run(ask())


async def ask_steadily(
    client: Client, wishes: Iterator[Wish], every_s: float, end: asyncio.Event
) -> list[Shot]:
    """One request after the other at fixed times, whatever becomes of them, until the `end`."""
    asked: list[asyncio.Task[Shot]] = []
    while not end.is_set():
        asked.append(asyncio.create_task(client.send(next(wishes))))
        with suppress(TimeoutError):
            await asyncio.wait_for(end.wait(), every_s)
    return list(await asyncio.gather(*asked))


async def run(site: Site, fair_by: str, args: argparse.Namespace, names: Sequence[str], turn: int) -> Run:
    prompter = await calibrate(await token_counter(site.session, site.target))
    flooding, name = names
    for each in names:
        await site.send(each, "once", 1)
    polite = Polite(site.target, prompter, name, args.prompt_tokens, args.output_tokens, args.every)
    of_a = _wishes(prompter, flooding, args.prompt_tokens, args.flood_tokens, f"{turn}/a")
    loop, context = asyncio.get_running_loop(), multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(1, mp_context=context) as process:
        begin, end = manager.Event(), manager.Event()
        begin.set()
        loop.call_later(args.seconds, end.set)
        alone = await loop.run_in_executor(process, ask_politely, polite, f"{turn}/alone", begin, end)
        begin.clear()
        end.clear()
        asking = loop.run_in_executor(process, ask_politely, polite, f"{turn}/beside", begin, end)
        flood = asyncio.gather(*(site.client.send(wish) for wish in itertools.islice(of_a, args.flood)))
        await asyncio.sleep(0)  # A's requests leave first
        begin.set()
        try:
            flooded = await flood
        finally:
            end.set()
        beside = await asking
    first = [sorted(shot.ttft for shot in shots if shot.ttft is not None) for shots in (alone, beside)]
    return Run(
        fair_by=fair_by,
        alone_p50=percentile(first[0], 0.5),
        alone_p95=percentile(first[0], 0.95),
        alone=len(alone),
        beside_p50=percentile(first[1], 0.5),
        beside_p95=percentile(first[1], 0.95),
        beside_worst=max(first[1], default=math.nan),
        beside=len(beside),
        flood_s=max(shot.done for shot in flooded) - min(shot.sent for shot in flooded),
        errors=tuple(
            f"{shot.failure}: {shot.message}" for shot in (*alone, *beside, *flooded) if shot.failure
        ),
    )


def _wishes(prompter: Prompter, adapter: str, prompt_tokens: int, tokens: int, key: str) -> Iterator[Wish]:
    for number in itertools.count():
        yield Wish(adapter, prompter.text(prompt_tokens, f"{key}/{number}"), tokens)


async def measure(args: argparse.Namespace) -> list[Run]:
    with workplace(args) as work:
        adapters = write_adapters(model_folder(args), work, count=2, rank=args.rank)
        names = [path.name for path in adapters]
        runs = []
        for turn in range(args.runs):
            for fair_by in args.fair_by:
                flags = (*model_flags(args), "--adapters-dir", str(work), "--fair-by", fair_by)
                async with serving(*flags) as site:
                    runs.append(await run(site, fair_by, args, names, turn))
        return runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("flood", __doc__)
    parser.add_argument("--fair-by", nargs="+", default=["adapter", "off"], metavar="HOW")
    parser.add_argument("--flood", type=int, default=200, help="requests of tenant A, all at once")
    parser.add_argument("--flood-tokens", type=int, default=128, help="output tokens of each of A's")
    parser.add_argument("--seconds", type=float, default=30.0, help="that B asks alone")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="between two of B's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=16, help="of each of B's")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(argv)
    runs = asyncio.run(measure(args))
    rows: list[tuple[str, list[str]]] = [
        ("fair by", [run.fair_by for run in runs]),
        ("B alone, first token p50, ms", [ms(run.alone_p50) for run in runs]),
        ("B alone, first token p95, ms", [ms(run.alone_p95) for run in runs]),
        ("B beside A, first token p50, ms", [ms(run.beside_p50) for run in runs]),
        ("B beside A, first token p95, ms", [ms(run.beside_p95) for run in runs]),
        ("B beside A, worst, ms", [ms(run.beside_worst) for run in runs]),
        ("p95, beside / alone", [f"{run.ratio:.2f}" for run in runs]),
        ("B's requests, alone and beside", [f"{run.alone} {run.beside}" for run in runs]),
        ("A's flood took, s", [f"{run.flood_s:.1f}" for run in runs]),
        ("errors", [str(len(run.errors)) for run in runs]),
    ]
    ratios = {how: [run.ratio for run in runs if run.fair_by == how] for how in args.fair_by}
    notes = [f"fair by {how}: p95 x {median(found):.2f} (median)" for how, found in ratios.items()]
    notes += sorted({error for run in runs for error in run.errors})
    publish(args, rows, {"runs": [as_record(run) for run in runs], "ratios": ratios}, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
