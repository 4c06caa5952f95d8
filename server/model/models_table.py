"""transformers imported with one look at the sources of its models instead of two.

To learn which module has which class, `transformers` reads the 1,600 files below its `models` when it is
imported, and `transformers.models` reads them again for the same table with shorter names: 0.3 s each, a
tenth of what all imports take (two cores of a Zen 4). So the second is given what the first has found. There
is no setting for that: the function that both ask is another one for as long as the import takes.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import import_utils

_READER = "define_import_structure"
_PREFIX = "models."


def import_models() -> None:
    """Import `transformers.models`. Leaves that to others where transformers works in another way."""
    read: Callable[..., Any] | None = getattr(import_utils, _READER, None)
    if "transformers.models" in sys.modules or read is None:
        return
    try:
        found = models_table(read)
    except (AttributeError, TypeError):
        return

    def known(path: str, prefix: str | None = None) -> Any:
        return found if Path(path) == _models() / "__init__.py" else read(path, prefix)

    setattr(import_utils, _READER, known)
    try:
        importlib.import_module("transformers.models")
    finally:
        setattr(import_utils, _READER, read)


def models_table(read: Callable[..., Any]) -> dict[Any, dict[str, set[str]]]:
    """{what classes need: {their module below `models`: classes}}, out of what `read` has found for
    `transformers`.
    """
    found = read(_models(), prefix="models")  # as `transformers` asks it; its answers are kept
    return {
        needed: {
            name.removeprefix(_PREFIX): classes
            for name, classes in modules.items()
            if name.startswith(_PREFIX)
        }
        for needed, modules in found.items()
    }


def _models() -> Path:
    return Path(transformers.__file__).parent / "models"
