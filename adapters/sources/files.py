"""Which files belong to an adapter, by name; every source asks here.

Only these are fetched from elsewhere, and only these may a link stand for. What else lies in a folder (a
trainer's state, a picture) is not ours to read. Pickles never are: reading one can run code.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from adapters.errors import AdapterInvalid
from adapters.names import shown
from adapters.spec import CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
TEXT_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What a folder may hold beside the weights that changes how an adapter answers."""

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, *TEXT_FILES)

_MAX_NAME_BYTES = 255  # what file systems allow
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def is_folder_name(name: str) -> bool:
    """Whether a client's name can be a folder's: one part, printable, no tricks."""
    return (
        bool(name)
        and name.isprintable()
        and name not in (".", "..")
        and not any(char in name for char in "/\\")
        and len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME_BYTES
    )


def is_pickle(name: str) -> bool:
    """Whether a file of this name may run code when it is read."""
    return name.lower().endswith(_PICKLES)


def why_no_pickle(name: str) -> str:
    return (
        f"{shown(name)} is a pickle, which can run code when it is read; save the adapter as {WEIGHTS_FILE}"
    )


def refuse_pickles(folder: Path) -> None:
    """Raises AdapterInvalid if the adapter's weights are only there as a pickle, or not at all.

    A pickle beside a safetensors file (a trainer's optimizer state) is never opened and does no harm.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except (OSError, ValueError) as error:
        raise AdapterInvalid("the adapter's folder cannot be read") from error
    refuse_pickle_names(names)


def refuse_pickle_names(names: Iterable[str]) -> None:
    """The same for the names of an adapter's files, wherever they are."""
    known = sorted(names)
    if WEIGHTS_FILE in known:
        return
    pickles = [name for name in known if is_pickle(name)]
    if pickles:
        raise AdapterInvalid(why_no_pickle(pickles[0]))
    raise AdapterInvalid(f"the adapter has no {WEIGHTS_FILE}")
