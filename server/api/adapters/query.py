"""Values in a query, or in a form. Each function raises BadRequest that names the parameter."""

from collections.abc import Mapping
from math import isfinite

from server.errors import BadRequest

_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def text(values: Mapping[str, str], name: str, max_chars: int) -> str:
    """ "" where it is not given."""
    value = values.get(name, "")
    if len(value) > max_chars:
        raise BadRequest(f"{name}: input should have {max_chars} characters at most", param=name)
    return value


def number(
    values: Mapping[str, str], name: str, usual: float, least: float, most: float, *, is_whole: bool = False
) -> float:
    given = values.get(name)
    if given is None:
        return usual
    try:
        value = float(int(given)) if is_whole else float(given)
    except (ValueError, OverflowError):
        value = float("nan")
    if not isfinite(value) or not least <= value <= most:
        kind = "a whole number" if is_whole else "a number"
        raise BadRequest(f"{name}: input should be {kind} from {least:g} to {most:g}", param=name)
    return value


def truth(values: Mapping[str, str], name: str) -> bool:
    """False where it is not given."""
    given = values.get(name, "false")
    if given.lower() not in _TRUTHS:
        raise BadRequest(f"{name}: input should be true or false", param=name)
    return _TRUTHS[given.lower()]
