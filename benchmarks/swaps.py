"""Does an answer ever mix two versions of an adapter, and are old versions forgotten?

Two adapters take turns under one name, 200 times, while sixteen clients stream greedily from that name, each
its own prompt again and again. Every answer must be that of the one adapter or of the other, to the last
token: what was begun with a version ends with it, and no KV of an old one is used for a new one. Each version
has bytes of its own that change nothing (a direction of A that B multiplies by zero), so the server meets 200
revisions and not two.

    python -m benchmarks.swaps --by post folder --json swaps.json

`post` loads a path in place of what the name meant; `folder` renames files into --adapters-dir, which the
server watches.
"""

import argparse
import asyncio
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks.adapter_folders import WEIGHTS, write_adapters
from benchmarks.prompts import WORDS, Prompter
from benchmarks.serving import Site, serving
from benchmarks.sse import SseParser
from benchmarks.trial import add_kv, as_record, mib, model_flags, model_folder, parser_of, publish, workplace

NAME = "swapped"
STRENGTH = 8.0  # of the adapters' noise: that no two of them answer alike
SETTLED = 0.25  # of the swaps: by then whatever is kept once has been made, and the KV cache has been filled
PATIENCE_S = 60.0  # for the last version to be the one that is served


@dataclass(slots=True)
class Tally:
    """What the clients were told, and whether that was enough for a server to have settled."""

    settle: int = 0  # answers
    is_settled: asyncio.Event = field(default_factory=asyncio.Event)
    answers: Counter[str] = field(default_factory=Counter)  # "first", "second", "mixture"
    failures: Counter[str] = field(default_factory=Counter)
    mixtures: list[str] = field(default_factory=list)

    def count(self, text: str, references: tuple[str, str]) -> None:
        kind = kind_of(text, references)
        self.answers[kind] += 1
        if self.answers.total() >= self.settle:
            self.is_settled.set()
        if kind == "mixture" and len(self.mixtures) < 5:
            self.mixtures.append(text)


def kind_of(text: str, references: tuple[str, str]) -> str:
    return dict(zip(references, ("first", "second"), strict=True)).get(text, "mixture")


@dataclass(frozen=True, slots=True)
class Run:
    """One way of swapping. Bytes."""

    by: str
    swaps: int
    refused: int  # swaps that the server did not accept
    loads: int  # versions that the server read
    first: int
    second: int
    mixtures: int
    failures: tuple[tuple[str, int], ...]
    is_last_served: bool
    kept: int  # versions in host memory at the end; one is right
    resident_early: int
    resident_end: int


class Versions:
    """Version n is one of two adapters, with bytes that no other version has."""

    def __init__(self, model: Path, work: Path, rank: int) -> None:
        from safetensors.torch import load_file

        self.pair = write_adapters(model, work / "pair", count=2, rank=rank + 1)
        self._tensors = [load_file(path / WEIGHTS) for path in self.pair]

    def write(self, number: int, path: Path) -> Path:
        """The weights of a version, in a file that is complete when it gets its name."""
        from safetensors.torch import save_file

        tensors = {name: tensor.clone() for name, tensor in self._tensors[number % 2].items()}
        for name, tensor in tensors.items():
            if ".lora_A." in name:
                tensor[-1].fill_(number % 128)  # bfloat16 counts no further than 256
                tensor[-1, 0] = number // 128
            else:
                tensor.mul_(STRENGTH)[:, -1].zero_()
        draft = path.with_name(".draft")
        save_file(tensors, draft)
        os.replace(draft, path)
        return path

    def make(self, number: int, folder: Path) -> Path:
        """A whole folder of a version."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.pair[number % 2] / "adapter_config.json", folder)
        self.write(number, folder / WEIGHTS)
        return folder


async def stream_text(site: Site, adapter: str, prompt: str, max_tokens: int) -> str:
    """A greedy answer, put together from its chunks. Raises RuntimeError for anything but a whole one."""
    body = {
        **{"model": adapter, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0},
        **{"ignore_eos": True, "stream": True},
    }
    parser, texts, finish = SseParser(), [], None
    async with site.session.post(site.url + "/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"http {response.status}: {(await response.text())[:200]}")
        async for chunk in response.content.iter_any():
            for data in parser.feed(chunk):
                if data == b"[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(f"stream error: {event['error']}")
                for choice in event["choices"]:
                    texts.append(choice["text"])
                    finish = choice["finish_reason"] or finish
    if finish is None:
        raise RuntimeError("cut off")
    return "".join(texts)


async def _client(
    site: Site, prompt: str, references: tuple[str, str], tally: Tally, tokens: int, end: asyncio.Event
) -> None:
    while not end.is_set():
        try:
            tally.count(await stream_text(site, NAME, prompt, tokens), references)
        except (RuntimeError, aiohttp.ClientError, OSError, TimeoutError) as error:
            tally.is_settled.set()  # nothing to wait for
            tally.failures[f"{type(error).__name__}: {error}"[:200]] += 1


async def _references(site: Site, prompt: str, folders: Sequence[Path], tokens: int) -> tuple[str, str]:
    """What the two adapters answer when nobody swaps them."""
    first, second = [await stream_text(site, folder.name, prompt, tokens) for folder in folders]
    if first == second:
        raise SystemExit("both adapters give the same answer, so a mixture could not be told")
    return first, second


async def _swap(site: Site, by: str, versions: Versions, folder: Path, number: int) -> bool:
    """Make the name mean version `number`."""
    if by == "folder":
        await asyncio.to_thread(versions.write, number, folder / NAME / WEIGHTS)
        return True
    staged = folder / ".staged" / str(number % 2)
    await asyncio.to_thread(versions.make, number, staged)
    body = {"lora_name": NAME, "lora_path": str(staged), "load_inplace": True}
    return await site.post("/v1/load_lora_adapter", body) == 200


async def _is_served(site: Site, prompt: str, expected: str, tokens: int) -> bool:
    """Whether the name means the last version, soon."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + PATIENCE_S
    while loop.time() < limit:
        if await stream_text(site, NAME, prompt, tokens) == expected:
            return True
        await asyncio.sleep(1.0)
    return False


async def run(by: str, args: argparse.Namespace, work: Path) -> Run:
    folder = work / by
    versions = Versions(model_folder(args), work, args.rank)
    references = [versions.make(number, folder / f"reference{number}") for number in range(2)]
    versions.make(0, folder / NAME)
    prompter = Prompter(WORDS, 1.0, 0, is_exact=False)
    prompts = [prompter.text(args.prompt_tokens, str(number)) for number in range(args.clients)]
    async with serving(*model_flags(args), "--adapters-dir", str(folder)) as site:
        right = [await _references(site, prompt, references, args.output_tokens) for prompt in prompts]
        for reference in references:
            shutil.rmtree(reference)  # or they would share what is counted as kept
            await site.post("/v1/unload_lora_adapter", {"lora_name": reference.name})
        before = await site.metric("vllm:lora_adapter_load_seconds_count")
        tally, end = Tally(args.settle), asyncio.Event()
        refused, early = 0, site.resident_bytes()
        async with asyncio.TaskGroup() as group:
            for prompt, texts in zip(prompts, right, strict=True):
                group.create_task(_client(site, prompt, texts, tally, args.output_tokens, end))
            await tally.is_settled.wait()
            for number in range(1, args.swaps + 1):
                refused += not await _swap(site, by, versions, folder, number)
                await asyncio.sleep(args.every)
                if number == max(1, round(SETTLED * args.swaps)):
                    early = site.resident_bytes()
            end.set()
        last = right[0][args.swaps % 2]
        return Run(
            by=by,
            swaps=args.swaps,
            refused=refused,
            is_last_served=await _is_served(site, prompts[0], last, args.output_tokens),
            loads=round(await site.metric("vllm:lora_adapter_load_seconds_count") - before),
            first=tally.answers["first"],
            second=tally.answers["second"],
            mixtures=tally.answers["mixture"],
            failures=tuple(tally.failures.most_common()),
            kept=round(await site.metric("vllm:num_cpu_loaded_lora_adapters")) - _brought_along(args),
            resident_early=early,
            resident_end=site.resident_bytes(),
        )


def _brought_along(args: argparse.Namespace) -> int:
    """Adapters that are loaded whatever we do: the embedded model's own."""
    from server.embedded.location import adapters_dir

    return 0 if args.model else sum(1 for path in adapters_dir().iterdir() if path.is_dir())


async def measure(args: argparse.Namespace) -> list[Run]:
    with workplace(args) as work:
        return [await run(by, args, work) for by in args.by]


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("swaps", __doc__)
    add_kv(parser)
    parser.add_argument("--by", nargs="+", choices=["post", "folder"], default=["post", "folder"])
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--every", type=float, default=0.25, metavar="S", help="between two swaps")
    parser.add_argument("--settle", type=int, default=1000, help="answers before the first swap")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=48)
    args = parser.parse_args(argv)
    runs = asyncio.run(measure(args))
    rows: list[tuple[str, list[str]]] = [
        ("swapped by", [run.by for run in runs]),
        ("swaps (refused)", [f"{run.swaps} ({run.refused})" for run in runs]),
        ("versions that the server read", [str(run.loads) for run in runs]),
        ("answers of the first adapter", [str(run.first) for run in runs]),
        ("answers of the second", [str(run.second) for run in runs]),
        ("mixtures", [str(run.mixtures) for run in runs]),
        ("failures", [str(sum(number for _, number in run.failures)) for run in runs]),
        ("the last version is served", ["yes" if run.is_last_served else "NO" for run in runs]),
        ("versions kept at the end", [str(run.kept) for run in runs]),
        (f"memory after {SETTLED:.0%} of the swaps, MiB", [mib(run.resident_early) for run in runs]),
        ("memory at the end, MiB", [mib(run.resident_end) for run in runs]),
    ]
    notes = [f"{run.by}: {number} x {failure}" for run in runs for failure, number in run.failures]
    publish(args, rows, {"runs": [as_record(run) for run in runs]}, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
