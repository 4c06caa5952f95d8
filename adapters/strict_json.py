"""JSON out of a stranger's file: strict, and not much dearer than its size says.

A parser makes of every `{}` or `[]` an object of dozens of bytes, and of keys that are there twice it keeps
the last one, where another reader may keep the first. So containers are counted before anything is parsed,
and a key that comes twice is refused. The function that looks for it is Python: between two objects of the
text other threads get the interpreter, which one long call of the parser would keep from them.
"""

import json

from adapters.errors import AdapterInvalid


def parse_object(text: bytes | bytearray, what: str, *, max_containers: int) -> dict[str, object]:
    """The object that `text` is, with at most so many objects and lists in it.

    Raises AdapterInvalid, naming `what` it is.
    """
    if text.count(b"{") + text.count(b"[") > max_containers:
        raise AdapterInvalid(f"{what} has more than {max_containers} objects and lists")
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
