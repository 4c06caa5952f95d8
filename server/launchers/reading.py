"""From what other launchers' flags say to our settings, where that is more than another name."""

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path

from server.launchers.flags import Given, UsageError, Value

_ADAPTER = re.compile(r"([^=@]+)(?:=([^=@]+))?(?:@([^=@]+))?")  # ID[@REVISION] or NAME=PLACE[@REVISION]
_LEVELS = {
    "trace": "debug",
    "debug": "debug",
    "info": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
}
_SOURCES = {"hub": ("local", "hub"), "s3": ("local", "s3"), "local": ("local",)}
_HEADROOM = "0.9"  # of its share, which both launchers plan with; the rest is for what they cannot count


def is_address(text: str) -> bool:
    """A container has a variable HOSTNAME of its own, with its name: that is nothing to listen on."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def read_model(text: str, given: Given) -> Mapping[str, Value]:
    """A folder, or the id of a model in the hub's cache on this machine; requests go on calling it so."""
    if Path(text).is_dir():
        return {"model": text}
    name, _, revision = text.partition("@")
    folder = _in_hub_cache(name, "config.json", given.get("revision") or revision, given)
    if folder is None:
        raise UsageError(_not_here(name))
    return {"model": str(folder), "served_model_name": (name,)}


def read_adapters(text: str, given: Given) -> Mapping[str, Value]:
    """A list of ID, ID@REVISION, NAME=FOLDER or NAME=ID; requests know each by its name."""
    words = [word.strip() for word in text.split(",")]
    return {"lora_modules": tuple(_module(word, given) for word in words if word)}


def read_sources(text: str, given: Given) -> Mapping[str, Value]:
    """Where clients may take adapters from: LoRAX loads no others beside those that it preloads."""
    source = given.get("default-adapter-source", text)
    if source not in _SOURCES:
        raise UsageError(f"there is no source {source!r} here: take one of {', '.join(_SOURCES)}")
    return {} if "preloaded-adapter-ids" in given else {"adapter_sources": _SOURCES[source]}


def read_seats(text: str, given: Given) -> Mapping[str, Value]:
    """The launchers count all that are let in; here some run, and the others wait, one of them at least."""
    from server.settings import Settings

    batch = int(Settings.model_fields["max_num_seqs"].default)
    if "max-batch-size" in given:
        batch = _whole("max-batch-size", given)
    if "max-concurrent-requests" not in given:
        return {"max_num_seqs": str(batch)}
    most = _whole("max-concurrent-requests", given)
    return {"max_num_seqs": str(min(batch, most)), "max_queued_requests": str(max(1, most - batch))}


def read_gpu_share(text: str, given: Given) -> Mapping[str, Value]:
    """Both say a share of the memory, and leave some of that share alone; ours is what is used."""
    whole = _share(given.get("cuda-memory-fraction", "1"))
    part = _share(given.get("memory-wiggle-room", _HEADROOM))
    return {"gpu_memory_utilization": f"{whole * part:g}"}


def read_origins(text: str, given: Given) -> Mapping[str, Value]:
    """Origins whose pages may read answers."""
    return {"allowed_origins": tuple(filter(None, text.split(",")))}


def read_log_level(text: str, given: Given) -> Mapping[str, Value]:
    """A level, or a list of them for modules that are not ours: `info,text_generation_router=debug`."""
    levels = [_LEVELS[word] for word in text.lower().split(",") if word in _LEVELS]
    return {"log_level": levels[0]} if levels else {}


def _module(word: str, given: Given) -> str:
    """As `--lora-modules` takes it: NAME=PATH."""
    from adapters.registry import is_adapter_name

    match = _ADAPTER.fullmatch(word)
    if match is None:
        raise UsageError(f"{word!r} is not ID, ID@REVISION or NAME=FOLDER")
    name, place, revision = match[1], match[2] or match[1], match[3]
    if not is_adapter_name(name):
        raise UsageError(f"requests cannot say {name!r}: write NAME={place}, and let them say NAME")
    folder = Path(place) if Path(place).is_dir() else None
    folder = folder or _in_hub_cache(place, "adapter_config.json", revision or "", given)
    if folder is None:
        raise UsageError(_not_here(place))
    return f"{name}={folder}"


def _in_hub_cache(name: str, file: str, revision: str, given: Given) -> Path | None:
    """The folder of a snapshot that has the file, as the hub's own tools keep it. Nobody is asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    cache = given.get("huggingface-hub-cache")
    try:
        found = try_to_load_from_cache(name, file, cache_dir=cache, revision=revision or None)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _not_here(place: str) -> str:
    if place.startswith(("/", ".", "~")):
        return f"there is no folder {place}: mount it, or give one that is there"
    return (
        f"{place} is neither a folder nor in the hub's cache on this machine: "
        f"download it (hf download {place} --local-dir FOLDER) and give its folder"
    )


def _whole(flag: str, given: Given) -> int:
    text = given[flag]
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise UsageError(f"--{flag} takes a whole number above 0, not {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"a share is a number above 0 and up to 1, not {text!r}")
    return share
