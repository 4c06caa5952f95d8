"""Do running streams notice that other requests bring cold adapters?

Two servers of this project: in one all adapters are in memory, in the other there is room for a few, so that
each request reads its adapter from files again, moves it to the device and evicts another. By turns, eight
streams run on one of them while the same requests come at the same times, one after the other, and the gaps
between the eight's tokens are compared. A run without those requests says what the machine does by itself.

    python -m benchmarks.cold_loads --model bench/model --work bench/cold --json cold.json

The files are in the page cache in all runs: reading a disk takes waiting and no cores.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from time import perf_counter

from benchmarks.adapter_folders import room_for, write_adapters
from benchmarks.metrics import Spread, spread
from benchmarks.probe import token_counter
from benchmarks.prompts import Prompter, calibrate
from benchmarks.records import BASE, Shot, Wish
from benchmarks.serving import Site, serving
from benchmarks.steady import gaps_within, steady_streams
from benchmarks.trial import as_record, median, model_flags, model_folder, ms, parser_of, publish, workplace

COLD_ROOM = 4  # adapters: one arrives while another is used
ALONE_S = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """The eight, and those who came meanwhile. Seconds."""

    kind: str  # "alone", "warm" or "cold"
    gap: Spread  # between tokens of the eight
    ttft: Spread  # of the requests that came
    loads: int  # adapters that the server read from files meanwhile
    late: int  # requests that left late, because the one before was not over
    seconds: float
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The same for warm and cold."""

    arriving: tuple[Wish, ...]
    every_s: float
    steady: tuple[Wish, ...]


async def run(site: Site, kind: str, plan: Plan) -> Run:
    async with steady_streams(site.session, site.url, plan.steady) as streams:
        before = await site.metric("vllm:lora_adapter_load_seconds_count")
        begin = perf_counter()
        shots: list[Shot] = []
        late = 0
        if kind == "alone":
            await asyncio.sleep(min(ALONE_S, len(plan.arriving) * plan.every_s))
        else:
            shots, late = await _arrive(site, plan)
        end = perf_counter()
        loads = await site.metric("vllm:lora_adapter_load_seconds_count") - before
    return Run(
        kind=kind,
        gap=spread(gaps_within(streams, begin, end)),
        ttft=spread(shot.ttft for shot in shots),
        loads=round(loads),
        late=late,
        seconds=end - begin,
        errors=(
            *(failure for stream in streams for failure in stream.failures),
            *(f"{shot.failure}: {shot.message}" for shot in shots if shot.failure),
        ),
    )


async def _arrive(site: Site, plan: Plan) -> tuple[list[Shot], int]:
    """One after the other, at fixed times if possible; how many of them were late."""
    shots: list[Shot] = []
    late, begin = 0, perf_counter()
    for number, wish in enumerate(plan.arriving):
        delay = begin + number * plan.every_s - perf_counter()
        late += delay < 0 and number > 0
        await asyncio.sleep(max(0.0, delay))
        shots.append(await site.client.send(wish))
    return shots, late


def plan_of(args: argparse.Namespace, names: Sequence[str], prompter: Prompter, turn: int) -> Plan:
    """The first adapters are the streams' own, if they are to have some; the others come. No prompt comes in
    two turns: nothing of it is in a cache.
    """
    own, others = names[: args.stream_adapters], names[args.stream_adapters :]
    return Plan(
        arriving=tuple(
            Wish(name, prompter.text(args.prompt_tokens, f"{turn}/{name}"), args.output_tokens)
            for name in others
        ),
        every_s=args.every,
        steady=tuple(
            Wish(
                own[number % len(own)] if own else BASE,
                prompter.text(args.prompt_tokens, f"{turn}/steady {number}"),
                args.stream_tokens,
            )
            for number in range(args.streams)
        ),
    )


def ratios(runs: Sequence[Run]) -> list[float]:
    """p99 of each cold run by that of the warm run beside it."""
    warm, cold = ([run.gap.p99 for run in runs if run.kind == kind] for kind in ("warm", "cold"))
    return [one / other for one, other in zip(cold, warm, strict=True)]


async def measure(args: argparse.Namespace) -> list[Run]:
    with workplace(args) as work:
        count = args.adapters + args.stream_adapters
        adapters = write_adapters(model_folder(args), work, count=count, rank=args.rank)
        names = [path.name for path in adapters]
        rooms = {"warm": count + 2, "cold": 2 * args.stream_adapters + COLD_ROOM}
        async with AsyncExitStack() as stack:
            sites: dict[str, Site] = {}
            for kind, room in rooms.items():
                num_bytes = str(room_for(room, adapters[0]))
                room_flags = ("--adapter-host-memory-bytes", num_bytes, "--adapter-memory-bytes", num_bytes)
                flags = (*model_flags(args), "--adapters-dir", str(work), *room_flags)
                sites[kind] = await stack.enter_async_context(serving(*flags))
            sites["alone"] = sites["warm"]
            prompter = await calibrate(await token_counter(sites["warm"].session, sites["warm"].target))
            for site in (sites["warm"], sites["cold"]):
                for name in (BASE, *names):  # whatever a first time costs, and what is warm gets warm
                    await site.send(name, "once", 1)
            runs = []
            for turn in range(args.runs):
                plan = plan_of(args, names, prompter, turn)
                for kind in ("alone", "warm", "cold"):
                    runs.append(await run(sites[kind], kind, plan))
                    print(f"{kind}: p99 {ms(runs[-1].gap.p99)} ms", file=sys.stderr, flush=True)
            return runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("cold_loads", __doc__)
    parser.add_argument("--adapters", type=int, default=100, help="that come, one after the other")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument(
        "--stream-tokens", type=int, default=2000, help="of each stream, before it begins anew"
    )
    parser.add_argument("--stream-adapters", type=int, default=0, help="the streams' own (default: none)")
    parser.add_argument("--every", type=float, default=0.6, metavar="S", help="from one to the next")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=4, help="of each that comes")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(argv)
    runs = asyncio.run(measure(args))
    rows: list[tuple[str, list[str]]] = [
        ("", [run.kind for run in runs]),
        ("inter-token p50, ms", [ms(run.gap.p50) for run in runs]),
        ("inter-token p99, ms", [ms(run.gap.p99) for run in runs]),
        ("longest gap, ms", [ms(run.gap.largest) for run in runs]),
        ("gaps", [str(run.gap.count) for run in runs]),
        ("first token of those that came p50, ms", [ms(run.ttft.p50) for run in runs]),
        ("adapters read", [str(run.loads) for run in runs]),
        ("left late", [str(run.late) for run in runs]),
        ("errors", [str(len(run.errors)) for run in runs]),
    ]
    found = ratios(runs)
    notes = [
        f"p99, cold / warm: {median(found):.3f} (median of {', '.join(f'{ratio:.3f}' for ratio in found)})"
    ]
    notes += sorted({error for run in runs for error in run.errors})
    publish(args, rows, {"runs": [as_record(run) for run in runs], "p99_ratios": found}, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
