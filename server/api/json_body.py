"""Bytes of a request body to a JSON object, refusing everything that is not one.

`json.loads` alone is too kind: it guesses UTF-16, takes NaN and 1e999, keeps the last of two equal keys, lets
a lone surrogate through that the tokenizer then trips over, and a deep or long enough value makes it raise
errors of other kinds. Each of these is a BadRequest here, which the path's shape turns into 400 or 422.
"""

import json
import re
from collections.abc import Callable
from math import isfinite
from typing import NoReturn

from server.api.shapes import shown
from server.errors import BadRequest, ServeError, UnsupportedMediaType

# Parsing and validating runs at about 10 ms per MiB, so this much takes well below a millisecond.
INLINE_BYTES = 64 * 1024
_MOST_BRACKETS = 200_000  # those in strings count, too: no context takes a text with so many

_HIGH_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(raw: bytes) -> dict[str, object]:
    """Raises: BadRequest. Takes about 10 ms per MiB: not on the event loop where the body is large."""
    if not raw.strip():
        raise BadRequest("the request body is empty; a JSON object is expected")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the request body is not valid UTF-8 (byte {error.start})") from None
    try:
        value = load_json(
            text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite
        )
        if _HIGH_ESCAPE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise BadRequest(f"the request body is not valid JSON: {error}") from None
    except UnicodeEncodeError:
        raise BadRequest(
            "the request body holds half of a surrogate pair, which is not a character"
        ) from None
    except RecursionError:
        raise BadRequest("the request body is nested too deeply") from None
    except ValueError:
        raise BadRequest("the request body holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise BadRequest("the request body must be a JSON object")
    return value


def load_json(text: str, **hooks: Callable[..., object]) -> object:
    """json.loads that lets other threads run between the numbers of a long text: else a list of them keeps
    the interpreter to itself for as long as it takes, in whatever thread that is. Lists have no such place to
    let others run, and validating objects has none, so the number of both is bounded.

    Raises: ValueError, RecursionError; BadRequest for too many lists and objects.
    """
    if len(text) > INLINE_BYTES:
        if text.count("[") + text.count("{") > _MOST_BRACKETS:
            raise BadRequest(f"the request body holds more than {_MOST_BRACKETS} opening brackets")
        hooks["parse_int"] = _integer
    return json.loads(text, **hooks)  # type: ignore[arg-type]


def check_json_type(content_type: str | None) -> None:
    """For routes that take JSON only: the header may be absent. Raises: BadRequest."""
    if content_type is not None and not _is_json(content_type):
        raise BadRequest("Content-Type must be application/json")


def check_tolerated_type(content_type: str | None) -> None:
    """For LoRAX's routes: also what curl -d sends when it is told nothing. Raises: UnsupportedMediaType."""
    if content_type is None or _is_json(content_type):
        return
    if _media_type(content_type) not in ("application/x-www-form-urlencoded", "text/plain"):
        raise UnsupportedMediaType("Content-Type must be application/json")


TypeCheck = Callable[[str | None], None]


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _is_json(content_type: str) -> bool:
    media_type = _media_type(content_type)
    return media_type == "application/json" or media_type.endswith("+json")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _refusal(key)
            seen.add(key)
    return result


def _refusal(key: str) -> ServeError:
    return BadRequest(f"the key {shown(key)!r} occurs twice in one object", param=shown(key))


def _integer(digits: str) -> int:
    return int(digits)  # a function of ours: the interpreter looks up whenever one is called


def _no_constant(name: str) -> NoReturn:
    raise BadRequest(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise BadRequest("the request body holds a number beyond the range of a double")
    return value
