"""What apps may answer: names with text, numbers, booleans, or lists of them. Runs in the app's process.

Arrays and tensors become lists by their own `tolist`, without an import of the library that made them.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

_MOST_NESTED = 8


class OutputError(Exception):
    """The app answered with something that has no form on the wire."""


def named_values(output: Any) -> dict[str, object]:
    """A dictionary, or the fields of an object of the response class. Raises: OutputError."""
    if hasattr(output, "model_dump"):
        output = output.model_dump()
    if not isinstance(output, Mapping):
        raise OutputError(f"an output must be a dictionary, not {_named(output)}")
    for name in output:
        if not isinstance(name, str):
            raise OutputError(f"the name of an output must be text, not {_named(name)}")
    return {name: _plain(name, value, _MOST_NESTED) for name, value in output.items()}


def flat_values(output: Any) -> dict[str, object]:
    """As named_values, for a stream: nothing nested, a list of one is its element. Raises: OutputError."""
    values = named_values(output)
    for name, value in values.items():
        if isinstance(value, list):
            if any(isinstance(element, list) for element in value):
                raise OutputError(
                    f"output {name!r}: a stream carries values and lists of values, nothing nested"
                )
            if len(value) == 1:
                values[name] = value[0]
    return values


def _plain(name: str, value: Any, depth: int) -> object:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise OutputError(f"output {name!r}: bytes must be UTF-8 (use base64 for others)") from None
    if isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            raise OutputError(f"output {name!r}: {value} is not a number in JSON")
        return value
    if isinstance(value, list | tuple):
        if depth == 0:
            raise OutputError(f"output {name!r}: lists are nested too deeply")
        return [_plain(name, element, depth - 1) for element in value]
    raise OutputError(f"output {name!r}: {_named(value)} is not text, a number, a boolean or a list of them")


def _named(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
