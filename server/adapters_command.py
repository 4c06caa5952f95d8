"""`motet adapters`: look after adapters, on disk before a server has them, and on a running server.

`check PATH... --model M` tells whether they can be served, before a server is started: each folder passes the
very checks that a server makes, its files are read, converted and measured in the served dtype. The base
model's weights are not loaded; its config tells which modules there are. What can be told without torch is
told first: for broken folders alone, nothing heavy is imported. `list`, `load` and `unload` speak to a
server.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from adapters.errors import AdapterError
from adapters.names import shown
from adapters.sources.files import WEIGHTS_FILE, refuse_pickles
from adapters.spec import LoraSpec
from adapters.types import kind_of
from server.embedded.location import model_dir
from server.progress import in_units
from server.remote_server import RemoteServer, ServerFailed, add_server_flags, server_of

if TYPE_CHECKING:
    from adapters.weights import LoraWeights
    from server.text.adapter_text import AdapterTexts

_FINE, _CANNOT_BE_SERVED, _NO_MODEL = 0, 1, 2
_UNBOUNDED = 1 << 62
_PAGE = 1000
_DTYPES = ("auto", "float32", "bfloat16", "float16")

Load = Callable[[Path], "LoraWeights"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the check of one folder came to. What is not known is None or empty."""

    path: str
    can_be_served: bool
    error: str | None = None  # why it cannot
    kind: str | None = None  # "lora", or what it has beside that, joined by "+"
    rank: int | None = None
    targets: tuple[str, ...] = ()
    bytes: int | None = None  # in the served dtype
    revision: str | None = None
    base_model: str | None = None  # what it was trained on, as its config says


def make_parser() -> argparse.ArgumentParser:
    """Of `motet adapters`."""
    parser = argparse.ArgumentParser(prog="motet adapters", description="Look after adapters.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="tell whether adapters can be served",
        description="Tell whether adapters can be served over a base model, without loading the model. "
        "Exits with 0 if all of them can, with 1 if one cannot, with 2 if the model cannot.",
    )
    check.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder of an adapter")
    check.add_argument(
        "--model", type=Path, default=None, help="folder of the base model (default: the embedded model)"
    )
    check.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="served dtype, as of motet serve on this machine's cpu with all its kernels (default: auto)",
    )
    check.add_argument(
        "--adapter-memory-bytes",
        type=_size,
        default=_UNBOUNDED,
        metavar="BYTES",
        help="what all adapters may take on the server, as 1GiB (default: no limit)",
    )
    check.add_argument("--json", action="store_true", help="print a JSON array")
    _add_remote_commands(commands)
    return parser


def main(words: Sequence[str]) -> int:
    """Run `motet adapters WORDS`; returns the exit status: 0 if all can be served."""
    flags = make_parser().parse_args(list(words))
    if flags.command == "check":
        return _check(flags)
    try:
        return _REMOTE[flags.command](server_of(flags), flags)
    except ServerFailed as error:
        print(f"motet: {error}", file=sys.stderr)
        return _CANNOT_BE_SERVED


def _add_remote_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    listing = commands.add_parser("list", help="those of a running server")
    listing.add_argument("search", nargs="?", default="", metavar="TEXT", help="only names with this in them")
    listing.add_argument("--json", action="store_true", help="print a JSON array")
    load = commands.add_parser("load", help="bring one to a running server")
    load.add_argument("name", metavar="NAME")
    load.add_argument(
        "--from",
        dest="source",
        metavar="WHERE",
        help="its folder as the server sees it, or org/name or s3://…, as --adapter-sources allows",
    )
    load.add_argument("--pin", action="store_true", help="it stays in memory")
    unload = commands.add_parser("unload", help="take one from a running server")
    unload.add_argument("name", metavar="NAME")
    unload.add_argument("--wait", type=float, default=10.0, metavar="S", help="for answers that use it")
    unload.add_argument("--force", action="store_true", help="end those that are left")
    for command in (listing, load, unload):
        add_server_flags(command)


def _list(server: RemoteServer, flags: argparse.Namespace) -> int:
    found: list[dict[str, Any]] = []
    query: dict[str, object] = {"search": flags.search, "limit": _PAGE}
    while True:
        page = server.get(f"/v1/adapters?{urlencode(query)}")
        found += page["data"]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    if flags.json:
        print(json.dumps(found, indent=2))
        return _FINE
    width = max((len(one["id"]) for one in found), default=0)
    for one in found:
        facts = [f"rank {one['rank']}", str(one["kind"]), in_units(one["bytes"]), str(one["tier"])]
        facts += ["pinned"] if one["pinned"] else []
        facts += [f"{one['users']} users"] if one["users"] else []
        print(f"{one['id']:<{width}}  {', '.join(facts)}")
    return _FINE


def _load(server: RemoteServer, flags: argparse.Namespace) -> int:
    body: dict[str, object] = {"name": flags.name, "pin": flags.pin}
    if flags.source is not None:
        body["path" if flags.source.startswith(("/", ".")) else "location"] = flags.source
    one = server.post("/v1/adapters", body)
    print(f"{one['id']}: rank {one['rank']}, {in_units(one['bytes'])}, {one['tier']}")
    return _FINE


def _unload(server: RemoteServer, flags: argparse.Namespace) -> int:
    query = urlencode({"wait": flags.wait, "force": str(flags.force).lower()})
    freed = server.delete(f"/v1/adapters/{quote(flags.name)}?{query}")
    left = f", {freed['users']} answers still use it" if freed["users"] else ""
    print(f"{flags.name}: gone, {in_units(freed['freed_bytes'])} freed{left}")
    return _FINE


_REMOTE = {"list": _list, "load": _load, "unload": _unload}


def _check(flags: argparse.Namespace) -> int:
    errors = {path: _error_in_short(path) for path in flags.paths}
    load: Load | None = None
    with ExitStack() as at_end:
        if None in errors.values():
            from server.model.errors import ModelError

            try:
                load = _loader(flags.model, flags.dtype, flags.adapter_memory_bytes, at_end)
            except ModelError as error:
                print(f"motet: {error}", file=sys.stderr)
                return _NO_MODEL
        verdicts = [_verdict(path, errors[path], load) for path in flags.paths]
    if flags.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    else:
        for verdict in verdicts:
            print(_sentence(verdict))
    return _FINE if all(verdict.can_be_served for verdict in verdicts) else _CANNOT_BE_SERVED


def _error_in_short(path: Path) -> str | None:
    """What is wrong with a folder as far as its names, its config and the header of its weights tell."""
    from adapters.safetensors_file import SafetensorsFile

    if not path.is_dir():
        return "there is no such folder"
    try:
        refuse_pickles(path)
        LoraSpec.from_folder(path)
        with SafetensorsFile(path / WEIGHTS_FILE):
            pass
    except AdapterError as error:
        return error.message
    return None


def _loader(model: Path | None, dtype: str, max_bytes: int, at_end: ExitStack) -> Load:
    """How a server would load a folder. Imports torch. Raises ModelError."""
    from adapters.weights import load_weights
    from server.model.skeleton import load_skeleton

    name = "float32" if model is None and dtype == "auto" else dtype
    base_folder = model_dir() if model is None else model
    base = load_skeleton(base_folder, name)
    texts = _texts(base_folder, base.vocab_size)
    if texts is not None:
        at_end.callback(texts.close)

    def load(folder: Path) -> "LoraWeights":
        weights = load_weights(folder, base.targets, base.dtype, max_bytes, base.weights)
        if texts is not None:
            texts.read(folder)
        return weights

    return load


def _texts(base_folder: Path, num_embeddings: int) -> "AdapterTexts | None":
    """None: the base's folder has no tokenizer that an adapter's could be compared with."""
    from server.text.adapter_text import AdapterTexts
    from server.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(base_folder)
    except (OSError, ValueError):
        return None
    return AdapterTexts(tokenizer, base_folder, num_embeddings=num_embeddings)


def _verdict(path: Path, error: str | None, load: Load | None) -> Verdict:
    if error is not None:
        return Verdict(str(path), False, error)
    assert load is not None, "it is made where a folder has passed the first checks"
    base_model = LoraSpec.from_folder(path).base_model
    try:
        weights = load(path)
    except AdapterError as refusal:
        return Verdict(str(path), False, refusal.message, base_model=base_model)
    return Verdict(
        path=str(path),
        can_be_served=True,
        kind=kind_of(weights.kinds),
        rank=weights.rank,
        targets=weights.target_names,
        bytes=weights.num_bytes,
        revision=weights.revision,
        base_model=base_model,
    )


def _sentence(verdict: Verdict) -> str:
    trained = "" if verdict.base_model is None else f"; trained on {shown(verdict.base_model)}"
    if not verdict.can_be_served:
        return f"{verdict.path}: cannot be served: {verdict.error}{trained}"
    assert verdict.bytes is not None
    facts = [str(verdict.kind), f"rank {verdict.rank}", " ".join(verdict.targets), in_units(verdict.bytes)]
    return f"{verdict.path}: can be served: {', '.join(filter(None, facts))}{trained}"


def _size(text: str) -> int:
    from server.settings import SettingsError, size_of  # pydantic: not needed without the flag

    try:
        return size_of(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
