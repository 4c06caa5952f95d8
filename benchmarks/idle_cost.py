"""What do adapters cost those who use none?

Two servers of one model, one that knows no adapters and one that has sixteen loaded, get the same load on the
base model by turns, now one first and now the other. Compared is the time per output token, pair by pair, so
that what else the machine does falls on both alike.

    python -m benchmarks.idle_cost --model bench/model --pairs 9 --json idle.json

The embedded model brings adapters of its own: this wants a model folder.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from benchmarks.adapter_folders import room_for, write_adapters
from benchmarks.load import Limit, closed_loop
from benchmarks.metrics import spread
from benchmarks.probe import token_counter
from benchmarks.prompts import Prompter, calibrate
from benchmarks.records import BASE, Shot, Wish
from benchmarks.serving import Site, serving
from benchmarks.trial import as_record, median, model_flags, ms, parser_of, publish, workplace


@dataclass(frozen=True, slots=True)
class Pair:
    """Seconds per output token, the median of all streams."""

    streams: int
    without: float
    having: float
    errors: int

    @property
    def ratio(self) -> float:
        """Tokens a second with adapters by those without."""
        return self.without / self.having


async def load(
    site: Site, prompter: Prompter, streams: int, args: argparse.Namespace, key: str
) -> list[Shot]:
    """Every stream once, all together."""
    wishes = (
        Wish(BASE, prompter.text(args.prompt_tokens, f"{key}/{number}"), args.output_tokens)
        for number in range(streams)
    )
    return list(
        (await closed_loop(site.client.send, wishes, streams, Limit(requests=streams), _ignore)).shots
    )


def _ignore(shot: Shot) -> None:
    """Nobody watches."""


async def measure(args: argparse.Namespace) -> list[Pair]:
    with workplace(args) as work:
        adapters = write_adapters(args.model, work, count=args.adapters, rank=args.rank)
        room = str(room_for(args.adapters + 2, adapters[0]))
        flags = ("--adapter-memory-bytes", room, "--adapter-host-memory-bytes", room)
        async with AsyncExitStack() as stack:
            without = await stack.enter_async_context(serving(*model_flags(args), *flags))
            having = await stack.enter_async_context(
                serving(*model_flags(args), *flags, "--adapters-dir", str(work))
            )
            prompter = await calibrate(await token_counter(without.session, without.target))
            for path in adapters:
                await having.send(path.name, "once", 8)
            for streams in args.streams:
                for site in (without, having):  # whatever a first time costs
                    await load(site, prompter, streams, args, "first")
            pairs = []
            for number in range(args.pairs):
                for streams in args.streams:
                    pairs.append(await _pair(without, having, prompter, streams, args, number))
            return pairs


async def _pair(
    without: Site, having: Site, prompter: Prompter, streams: int, args: argparse.Namespace, number: int
) -> Pair:
    """Who is first changes from pair to pair."""
    sites = [without, having] if number % 2 else [having, without]
    shots = {site.url: await load(site, prompter, streams, args, f"{number}/{streams}") for site in sites}
    seconds = {url: spread(shot.per_token for shot in found).p50 for url, found in shots.items()}
    return Pair(
        streams=streams,
        without=seconds[without.url],
        having=seconds[having.url],
        errors=sum(shot.failure is not None for found in shots.values() for shot in found),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("idle_cost", __doc__)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    args = parser.parse_args(argv)
    if args.model is None:
        parser.error("--model: a model without adapters of its own is needed")
    pairs = asyncio.run(measure(args))
    by_streams = {streams: [pair for pair in pairs if pair.streams == streams] for streams in args.streams}
    rows: list[tuple[str, list[str]]] = [
        ("", [f"{streams} streams" for streams in by_streams]),
        ("per token without, ms", [ms(median([p.without for p in found])) for found in by_streams.values()]),
        ("per token with, ms", [ms(median([p.having for p in found])) for found in by_streams.values()]),
        (
            "tokens/s, with / without",
            [f"{median([p.ratio for p in found]):.4f}" for found in by_streams.values()],
        ),
        ("lowest pair", [f"{min(p.ratio for p in found):.4f}" for found in by_streams.values()]),
        ("highest pair", [f"{max(p.ratio for p in found):.4f}" for found in by_streams.values()]),
        ("pairs", [str(len(found)) for found in by_streams.values()]),
        ("errors", [str(sum(p.errors for p in found)) for found in by_streams.values()]),
    ]
    ratios = {str(streams): median([pair.ratio for pair in found]) for streams, found in by_streams.items()}
    publish(args, rows, {"pairs": [as_record(pair) for pair in pairs], "ratios": ratios})
    return 0


if __name__ == "__main__":
    sys.exit(main())
