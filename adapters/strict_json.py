"""JSON out of a stranger's file: strict, and not much dearer than its size says.

A parser makes of every value an object of dozens of bytes, and one call of it holds the interpreter lock from
the first to the last: half a second for some megabytes of keys, in which nobody else's stream goes on. So
values are counted before anything is parsed. Of keys that are there twice it would keep the last one, where
another reader may keep the first: they are refused.
"""

import json

from adapters.errors import AdapterInvalid

MAX_VALUES = 100_000
"""About 20 ms. 12 000 tensors; the largest model that is served has a thousand layers to adapt."""


def parse_object(text: bytes | bytearray, what: str) -> dict[str, object]:
    """The object that `text` is. Raises AdapterInvalid, naming `what` it is."""
    if sum(text.count(mark) for mark in b",[{") > MAX_VALUES:
        raise AdapterInvalid(f"{what} holds more than {MAX_VALUES} values")
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{what} is not valid JSON") from error
    if not isinstance(parsed, dict):
        raise AdapterInvalid(f"{what} is not a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key is there twice")
    return record


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
