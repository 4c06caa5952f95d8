"""What a user may ask of `motet bench`: the arguments, checked, as one frozen record."""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arrivals import Arrival
from benchmarks.load import Limit
from benchmarks.mix import Mix
from benchmarks.records import Api, Wire

OPEN_LOOP_S = 10.0  # how long a rate is held if nothing else is said


@dataclass(frozen=True, slots=True)
class Options:
    url: str
    model: str | None
    adapters: tuple[str, ...]  # names; ("all",): whatever the server lists; empty: the base model
    mix: Mix
    zipf_alpha: float
    concurrency: tuple[int, ...]
    rates: tuple[float, ...]  # not empty: open loop
    ramp_s: float
    arrival: Arrival
    requests: int | None
    duration_s: float | None
    prompt_tokens: int
    output_tokens: int
    shared_prefix: int
    seed: int
    warmup: int | None
    wait_s: float
    json: Path | None
    plot: Path | None
    profile: bool
    label: str
    wire: Wire

    def limit(self, level: float) -> Limit:
        """When a level ends: as asked, else enough requests for a median to mean something."""
        if self.duration_s is not None:
            return Limit(seconds=self.duration_s)
        if self.requests is not None:
            return Limit(requests=self.requests)
        if self.rates:
            return Limit(requests=max(16, round(level * OPEN_LOOP_S)))
        return Limit(requests=max(8, 3 * round(level)))


def parse(argv: Sequence[str]) -> Options:
    """Exits with status 2 and a usage line on what makes no sense, as argparse does."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("requests", "duration", "prompt_tokens", "output_tokens", "timeout"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if min(args.concurrency) < 1 or min(args.rate or [1.0]) <= 0:
        parser.error("--concurrency and --rate must be above 0")
    if min(args.shared_prefix, args.warmup or 0, args.ramp) < 0:
        parser.error("--shared-prefix, --warmup and --ramp must be 0 or more")
    if args.requests and args.duration:
        parser.error("--requests and --duration exclude each other")
    wire = Wire(
        api=args.api,
        extra=args.extra,
        api_key=args.api_key,
        asks_usage=not args.no_usage,
        timeout_s=args.timeout,
        keeps_alive=args.keep_alive,
    )
    return Options(
        url=args.url,
        model=args.model,
        adapters=tuple(name.strip() for name in args.adapters.split(",") if name.strip()),
        mix=args.mix,
        zipf_alpha=args.zipf_alpha,
        concurrency=tuple(args.concurrency),
        rates=tuple(args.rate or ()),
        ramp_s=args.ramp,
        arrival=args.arrival,
        requests=args.requests,
        duration_s=args.duration,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        shared_prefix=args.shared_prefix,
        seed=random.SystemRandom().randrange(10**6) if args.seed is None else args.seed,
        warmup=args.warmup,
        wait_s=args.wait,
        json=args.json,
        plot=args.plot,
        profile=args.profile,
        label=args.label,
        wire=wire,
    )


def make_parser() -> argparse.ArgumentParser:
    """Of `motet bench`."""
    parser = argparse.ArgumentParser(
        prog="motet bench",
        description="Put load on an OpenAI or LoRAX server and measure how fast its streams are.",
    )
    _add_server(parser.add_argument_group("the server"))
    _add_load(parser.add_argument_group("the load"))
    _add_request(parser.add_argument_group("each request"))
    output = parser.add_argument_group("the result")
    output.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it")
    output.add_argument(
        "--profile", action="store_true", help="say where the time of the server's steps went"
    )
    output.add_argument("--label", default="", help="a name for this run, in the JSON and the plot's title")
    return parser


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default="http://127.0.0.1:8000", help="base URL (default %(default)s)")
    group.add_argument("--api", type=Api, choices=list(Api), default=Api.CHAT, help="default %(default)s")
    group.add_argument("--model", help="the base model's name (default: the first of /v1/models)")
    group.add_argument("--api-key", help="sent as a bearer token")
    group.add_argument(
        "--wait", type=float, default=0.0, metavar="S", help="wait this long for the server (default 0)"
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adapters",
        default="",
        metavar="A,B,..",
        help="adapters to ask for, or: all (those the server lists)",
    )
    group.add_argument(
        "--mix",
        type=Mix,
        choices=list(Mix),
        default=Mix.UNIFORM,
        help="who asks for which (default %(default)s)",
    )
    group.add_argument(
        "--zipf-alpha", type=float, default=1.0, help="steepness of zipf (default %(default)s)"
    )
    group.add_argument(
        "--concurrency", type=int, nargs="+", default=[1], metavar="N", help="closed loop: this many users"
    )
    group.add_argument(
        "--ramp", type=float, default=0.0, metavar="S", help="the users come one by one over S seconds"
    )
    group.add_argument(
        "--rate", type=float, nargs="+", metavar="R", help="open loop instead: this many requests a second"
    )
    group.add_argument(
        "--arrival", type=Arrival, choices=list(Arrival), default=Arrival.POISSON, help="default %(default)s"
    )
    group.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help="per level (default: 3 per user and 8 at least, or 10 s of the rate)",
    )
    group.add_argument("--duration", type=float, metavar="S", help="per level, instead of --requests")
    group.add_argument(
        "--warmup",
        type=int,
        metavar="N",
        help="requests before measuring (default: 2, and 1 for each adapter)",
    )


def _add_request(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt-tokens", type=int, default=200, metavar="N", help="default %(default)s")
    group.add_argument("--output-tokens", type=int, default=64, metavar="N", help="default %(default)s")
    group.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="N",
        help="tokens before the prompt that all requests share",
    )
    group.add_argument(
        "--extra",
        type=_json_object,
        default={},
        metavar="JSON",
        help='more for the body, e.g. {"ignore_eos": true}',
    )
    group.add_argument("--seed", type=int, help="of prompts, mix and arrivals (default: drawn and reported)")
    group.add_argument("--timeout", type=float, default=300.0, metavar="S", help="default %(default)s")
    group.add_argument("--no-usage", action="store_true", help="do not ask for usage: count chunks")
    group.add_argument("--keep-alive", action="store_true", help="reuse connections (default: one a request)")


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value
