"""Thousands of adapters where the device has room for a few dozen.

Requests leave by a schedule (Poisson), each for an adapter drawn by Zipf's law: a few are popular, most are
asked for now and then. One server has little room for adapters and one holds them all; both get the same
requests. Before that every adapter is asked once, so that all have answered, and whatever a server keeps is
there. What the first one holds in memory is read every few seconds: once its room is full, it must not grow.

    python -m benchmarks.many_adapters --work bench/many --json many.json
"""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count

from benchmarks.adapter_folders import room_for, write_adapters
from benchmarks.arrivals import Arrival, offsets
from benchmarks.load import Limit, closed_loop, open_loop
from benchmarks.metrics import Spread, spread
from benchmarks.mix import Mix, choices
from benchmarks.probe import token_counter
from benchmarks.prompts import Prompter, calibrate
from benchmarks.records import Shot, Wish
from benchmarks.serving import Site, serving
from benchmarks.trial import (
    add_kv,
    as_record,
    mib,
    model_flags,
    model_folder,
    ms,
    parser_of,
    publish,
    workplace,
)

FIRST_S = 60.0  # in which the server's room fills
SWEEP_USERS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """One server under the load. Seconds and bytes."""

    kind: str  # "few fit" or "all fit"
    requests: int
    ttft: Spread
    asked: int  # distinct adapters that answered when all were asked once
    drawn: int  # distinct adapters that the traffic asked for
    loads: int  # adapters that were read from files
    errors: tuple[tuple[str, int], ...]
    resident: tuple[tuple[float, int], ...]  # what the server held, by seconds from the beginning

    @property
    def growth(self) -> float:
        """Bytes, from the first sample after the first minute to the last one; NaN without two."""
        return growth(self.resident, FIRST_S)


def growth(resident: Sequence[tuple[float, int]], first_s: float) -> float:
    """Bytes from the first sample after `first_s` to the last one; NaN where there are not two."""
    late = [num_bytes for at, num_bytes in resident if at >= first_s]
    return float(late[-1] - late[0]) if len(late) > 1 else float("nan")


@asynccontextmanager
async def sampled(site: Site, every_s: float) -> AsyncIterator[list[tuple[float, int]]]:
    """What the server holds, every few seconds while the context is open, and at its end."""
    samples: list[tuple[float, int]] = []
    loop = asyncio.get_running_loop()
    began = loop.time()

    def sample() -> None:
        samples.append((loop.time() - began, site.resident_bytes()))

    async def watch() -> None:
        for number in count():
            await asyncio.sleep(max(0.0, began + number * every_s - loop.time()))
            sample()

    task = asyncio.create_task(watch())
    try:
        yield samples
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        sample()


def wishes_of(
    args: argparse.Namespace, names: Sequence[str], prompter: Prompter, tokens: int
) -> Iterator[Wish]:
    drawn = choices(Mix.ZIPF, names, str(args.seed), args.zipf_alpha)
    for number, name in enumerate(drawn):
        yield Wish(name, prompter.text(args.prompt_tokens, f"{args.seed}/{number}"), tokens)


async def run(site: Site, kind: str, args: argparse.Namespace, names: Sequence[str]) -> Run:
    prompter = await calibrate(await token_counter(site.session, site.target))
    wishes = wishes_of(args, names, prompter, args.output_tokens)
    schedule = offsets(Arrival.POISSON, args.rate, str(args.seed))
    limit = Limit(seconds=60 * args.minutes)
    asking = (Wish(name, "once", 1) for name in names)
    sweep = await closed_loop(site.client.send, asking, SWEEP_USERS, Limit(requests=len(names)), _ignore)
    before = await site.metric("vllm:lora_adapter_load_seconds_count")
    async with sampled(site, args.sample) as resident:
        level = await open_loop(site.client.send, wishes, args.rate, schedule, limit, _ignore)
    loads = await site.metric("vllm:lora_adapter_load_seconds_count") - before
    shots = (*sweep.shots, *level.shots)
    errors = Counter(f"{shot.failure}: {shot.message}" for shot in shots if shot.failure)
    return Run(
        kind=kind,
        requests=len(shots),
        ttft=spread(shot.ttft_scheduled for shot in level.good),
        asked=len({shot.adapter for shot in sweep.good}),
        drawn=len({shot.adapter for shot in level.shots}),
        loads=round(loads),
        errors=tuple(errors.most_common()),
        resident=tuple(resident),
    )


def _ignore(shot: Shot) -> None:
    """Nobody watches."""


async def measure(args: argparse.Namespace) -> list[Run]:
    with workplace(args) as work:
        adapters = write_adapters(model_folder(args), work, count=args.adapters, rank=args.rank)
        names = [path.name for path in adapters]
        rooms = {"few fit": (args.room, args.host_room), "all fit": (args.adapters + 2, args.adapters + 2)}
        runs = []
        for kind, (device_room, host_room) in rooms.items():
            flags = (
                *model_flags(args),
                *("--adapters-dir", str(work)),
                *("--adapter-memory-bytes", str(room_for(device_room, adapters[0]))),
                *("--adapter-host-memory-bytes", str(room_for(host_room, adapters[0]))),
            )
            async with serving(*flags) as site:
                await _listed(site, len(names))
                runs.append(await run(site, kind, args, names))
        return runs


async def _listed(site: Site, num_adapters: int) -> None:
    """The server reads its folder at the start, in the background if that takes long: wait for its end."""
    known = -1
    while known < num_adapters:
        await asyncio.sleep(2.0)
        models = await site.get("/v1/models")
        now = sum(1 for card in models["data"] if card.get("parent"))
        if now == known:
            return  # it lists what was asked for, or goes no further
        known = now


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("many_adapters", __doc__)
    add_kv(parser)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--room", type=int, default=32, help="adapters that fit on the device")
    parser.add_argument("--host-room", type=int, default=256, help="adapters that fit into host memory")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--zipf-alpha", type=float, default=1.1)
    parser.add_argument("--sample", type=float, default=10.0, metavar="S", help="between two looks at memory")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    runs = asyncio.run(measure(args))
    rows: list[tuple[str, list[str]]] = [
        ("", [run.kind for run in runs]),
        ("requests", [str(run.requests) for run in runs]),
        ("failed", [str(sum(number for _, number in run.errors)) for run in runs]),
        (f"adapters of {args.adapters} that answered", [str(run.asked) for run in runs]),
        ("adapters that the traffic asked for", [str(run.drawn) for run in runs]),
        ("adapters read from files", [str(run.loads) for run in runs]),
        ("first token from schedule p50, ms", [ms(run.ttft.p50) for run in runs]),
        ("first token from schedule p99, ms", [ms(run.ttft.p99) for run in runs]),
        ("memory at the end, MiB", [mib(run.resident[-1][1]) for run in runs]),
        ("growth after the first minute, MiB", [mib(run.growth) for run in runs]),
    ]
    notes = [f"{run.kind}: {number} x {error}" for run in runs for error, number in run.errors]
    result = {"runs": [{**as_record(run), "growth": run.growth} for run in runs]}
    publish(args, rows, result, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
