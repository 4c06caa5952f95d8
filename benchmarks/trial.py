"""What the benchmarks of the adapters have in common: their arguments, and how they tell what they found."""

import argparse
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.metrics import percentile
from benchmarks.report import columns, write_json
from server.embedded.location import model_dir

Rows = Sequence[tuple[str, Sequence[str]]]


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """With the arguments that all of them take."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0]
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="the base model (default: the embedded one)"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where adapters are written and kept (default: nowhere)"
    )
    parser.add_argument(
        "--flags", type=shlex.split, default=[], metavar="'...'", help="more flags for the server"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    return parser


def add_kv(parser: argparse.ArgumentParser) -> None:
    """For those who look at memory: a large KV cache takes its pages one by one, for hours."""
    parser.add_argument(
        "--kv", default="32MiB", metavar="BYTES", help="memory of the KV cache (default: 32MiB)"
    )


def model_flags(args: argparse.Namespace) -> list[str]:
    """What every server of the trial is started with."""
    kv = ["--kv-cache-memory-bytes", args.kv] if "kv" in args else []
    return [*([str(args.model)] if args.model else []), *kv, *args.flags]


def model_folder(args: argparse.Namespace) -> Path:
    return args.model or model_dir()


@contextmanager
def workplace(args: argparse.Namespace) -> Iterator[Path]:
    """A folder for adapters: the one that was named, or one that goes at the end."""
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        yield args.work
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def publish(
    args: argparse.Namespace, rows: Rows, result: Mapping[str, object], notes: Sequence[str] = ()
) -> None:
    """The table to people, the rest to programs."""
    print("\n".join(columns(rows)))
    for note in notes:
        print(note)
    if args.json:
        settings = {name: _plain(value) for name, value in vars(args).items() if name != "json"}
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine.describe()}
        write_json(args.json, {**about, "settings": settings, **result})
        print(f"written: {args.json}")


def _plain(value: Any) -> object:
    return str(value) if isinstance(value, Path) else value


def as_record(value: Any) -> dict[str, object]:
    """A dataclass for the JSON."""
    record: dict[str, object] = asdict(value)
    return record


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if math.isfinite(seconds) else "-"


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f}" if math.isfinite(num_bytes) else "-"


def median(values: Sequence[float]) -> float:
    return percentile(sorted(values), 0.5)
