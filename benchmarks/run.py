"""A run of the load generator: look for the server, warm it up, load it level by level, publish.

The order is fixed and every stage gets plain records from the one before, so that what was sent can be read
off the JSON: the seed, the mix and the level decide every prompt and every adapter.
"""

import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from tqdm import tqdm

from benchmarks import machine, probe, report
from benchmarks.arrivals import offsets
from benchmarks.client import Client, open_session
from benchmarks.load import Limit, closed_loop, open_loop
from benchmarks.mix import Mix, choices
from benchmarks.options import Options
from benchmarks.probe import NotReady
from benchmarks.prompts import Prompter, calibrate
from benchmarks.records import BASE, Level, Shot, Target, Wish
from benchmarks.step_parts import StepParts, parts_table, read_parts

WARMUP_USERS = 4
WARMUP_TOKENS = 8  # enough to reach the decode path


@dataclass(frozen=True, slots=True)
class Measured:
    """What became of a load, level by level, and of whom it was asked."""

    levels: tuple[Level, ...]  # empty: not one request of the warm-up had an answer
    target: Target
    names: tuple[str, ...]  # who the mix chose from
    parts: tuple[StepParts, ...] = ()  # of each level, if they were asked for


async def run(options: Options, command: Sequence[str]) -> int:
    """Everything between arguments and exit status. Raises NotReady if there is nothing to measure."""
    measured = await measure(options)
    if not measured.levels:
        return 1
    _publish(measured, options, command)
    return 0 if all(level.good for level in measured.levels) else 1


async def measure(options: Options) -> Measured:
    """Look for the server, warm it up, load it level by level. Raises NotReady."""
    async with open_session(options.wire) as session:
        target = await probe.find(session, options.url, options.model, options.wait_s)
        names = _names(options, target)
        prompter = await calibrate(await probe.token_counter(session, target))
        _introduce(options, target, names, prompter)
        client = Client(session, target, options.wire)
        levels: list[Level] = []
        parts: list[StepParts] = []
        if await _warm_up(client, options, names, prompter):
            for value in options.rates or options.concurrency:
                before = await read_parts(session, target.url) if options.profile else None
                levels.append(await _level(client, options, names, prompter, value))
                if before is not None:
                    parts.append((await read_parts(session, target.url)).since(before))
        return Measured(tuple(levels), target, names, tuple(parts))


def _names(options: Options, target: Target) -> tuple[str, ...]:
    """Who the mix chooses from. The base model may be one of them."""
    if options.adapters == ("all",):
        if not target.adapters:
            raise NotReady(
                f"The server at {target.url} lists no adapters, so --adapters all asks for nobody."
            )
        return target.adapters
    return tuple(BASE if name == target.model else name for name in options.adapters) or (BASE,)


def _introduce(options: Options, target: Target, names: Sequence[str], prompter: Prompter) -> None:
    length = f"{options.prompt_tokens} + {options.output_tokens} tokens"
    if options.shared_prefix:
        length = f"{options.shared_prefix} shared + {length}"
    print(
        f"{target.url}  {target.model or '(unnamed model)'}  {options.wire.api} API  {target.server}".rstrip()
    )
    precision = "exact" if prompter.is_exact else "prompt length about right"
    print(f"{length} a request ({precision}), {_who(options, names)}")
    print(f"seed {options.seed}\n", flush=True)


def _who(options: Options, names: Sequence[str]) -> str:
    if tuple(names) == (BASE,):
        return "base model only"
    return f"{len(names)} adapter{'s' if len(names) > 1 else ''}, mix {options.mix}"


def _wishes(options: Options, prompter: Prompter, adapters: Iterator[str], key: str) -> Iterator[Wish]:
    """Endless. Prompts differ between levels and runs, so that no prefix cache meets an old friend."""
    for number in itertools.count():
        prompt = prompter.text(
            options.prompt_tokens,
            f"{key}/{number}",
            shared=options.shared_prefix,
            shared_key=str(options.seed),
        )
        yield Wish(adapter=next(adapters), prompt=prompt, max_tokens=options.output_tokens)


async def _warm_up(client: Client, options: Options, names: Sequence[str], prompter: Prompter) -> bool:
    """A few short requests over all adapters, not counted. False if none of them was answered."""
    count = max(2, len(set(names))) if options.warmup is None else options.warmup
    if not count:
        return True
    wishes = (
        Wish(wish.adapter, wish.prompt, min(WARMUP_TOKENS, wish.max_tokens))
        for wish in _wishes(options, prompter, choices(Mix.DISTINCT, names, ""), f"{options.seed}/warmup")
    )
    users = min(WARMUP_USERS, count)
    level = await closed_loop(client.send, wishes, users, Limit(requests=count), lambda shot: None)
    for line in report.failure_lines(level):
        _warn(f"warm-up, {line}")
    return bool(level.good)


async def _level(
    client: Client, options: Options, names: Sequence[str], prompter: Prompter, value: float
) -> Level:
    key = f"{options.seed}/{value:g}"
    adapters = choices(options.mix, names, key, options.zipf_alpha)
    wishes = _wishes(options, prompter, adapters, key)
    limit = options.limit(value)
    title = f"{value:g} requests/s" if options.rates else f"{value:g} concurrent"
    with tqdm(total=limit.requests, desc=title, unit="req", leave=False, disable=None) as bar:

        def on_done(shot: Shot) -> None:
            bar.update()

        if options.rates:
            schedule = offsets(options.arrival, value, key)
            return await open_loop(client.send, wishes, value, schedule, limit, on_done)
        return await closed_loop(client.send, wishes, int(value), limit, on_done, options.ramp_s)


def _publish(measured: Measured, options: Options, command: Sequence[str]) -> None:
    levels, target, names = measured.levels, measured.target, measured.names
    print(report.level_table(levels))
    if len(set(names)) > 1:
        print("\n" + report.adapter_table(levels[-1]))
    if measured.parts:
        walls = [level.wall for level in levels]
        print("\n" + parts_table([level.title for level in levels], measured.parts, walls))
    for line in (line for level in levels for line in report.failure_lines(level)):
        print(line)
    now = datetime.now(UTC)
    about = machine.describe()
    if options.json:
        run: dict[str, object] = {
            "label": options.label,
            "date": now.isoformat(timespec="seconds"),
            "command": shlex.join(_without_key(command)),
            "machine": about,
            "server": {"url": target.url, "model": target.model, "says": target.server},
            "load": {
                "api": str(options.wire.api),
                "adapters": list(names),
                "mix": str(options.mix),
                "zipf_alpha": options.zipf_alpha,
                "arrival": str(options.arrival) if options.rates else None,
                "ramp_s": options.ramp_s,
                "prompt_tokens": options.prompt_tokens,
                "output_tokens": options.output_tokens,
                "shared_prefix": options.shared_prefix,
                "seed": options.seed,
            },
            "step_parts": [asdict(parts) for parts in measured.parts],
        }
        report.write_json(options.json, report.as_json(levels, run))
        print(f"\nwritten: {options.json}")
    if options.plot:
        from benchmarks.plot import write_plot

        where = f"{about['cpu']}, {about['cores']} cores, {now:%Y-%m-%d}"
        what = f"{options.prompt_tokens} + {options.output_tokens} tokens, {_who(options, names)}"
        title = options.label or f"{target.model or target.url}"
        write_plot(options.plot, levels, title, f"{what}  |  {options.wire.api} API  |  {where}")
        print(f"drawn: {options.plot}")


def _without_key(command: Sequence[str]) -> list[str]:
    """The command line as it may be published: without the secret."""
    words = [word if not word.startswith("--api-key=") else "--api-key=***" for word in command]
    return ["***" if i and words[i - 1] == "--api-key" else word for i, word in enumerate(words)]


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
