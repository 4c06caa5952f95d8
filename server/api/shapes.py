"""The shapes in which refusals are written: one per family of routes, chosen by the path alone.

The path decides also where no route matches, so that an unknown `/v1/...` is an OpenAI error and an unknown
`/api/...` an Ollama one.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

from server.errors import (
    AnswerIncomplete,
    BadRequest,
    EngineFailed,
    ModelNotFound,
    Overloaded,
    ServeError,
    TemplateFailed,
)

LORAX_PATHS = frozenset(
    (
        "/",
        "/generate",
        "/generate_stream",
        "/info",
        "/tokenize",
        "/chat_tokenize",
        "/detokenize",
        "/invocations",
        "/startup",
    )
)


_SHOWN_CHARS = 64
_NUMBERS_AT_ONCE = 1000  # written in well below a millisecond


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How one family of routes says no."""

    status: Callable[[ServeError], int]
    body: Callable[[ServeError], dict[str, object]]
    name: str = ""  # of the family, in the documentation


json_text = json.JSONEncoder(separators=(",", ":")).encode
"""Compact and ASCII only: no character that any client's line reader could split at."""


def to_json(value: object) -> bytes:
    """The bytes of `json_text`."""
    return json_text(value).encode("ascii")


def long_json_text(value: object, depth: int = 5) -> str:
    """As json_text, written piece by piece down to this depth of nesting: whoever writes a large value at
    once keeps the interpreter from all other threads until it is done. Numbers in a row are one piece.
    """
    if depth and isinstance(value, dict):
        members = [f"{json_text(key)}:{long_json_text(item, depth - 1)}" for key, item in value.items()]
        return f"{{{','.join(members)}}}"
    if depth and isinstance(value, list):
        pieces: list[str] = []
        for is_number, items in groupby(value, _is_number):
            if is_number:
                pieces += [json_text(batch)[1:-1] for batch in _batches(items)]
            else:
                pieces += [long_json_text(item, depth - 1) for item in items]
        return f"[{','.join(pieces)}]"
    return json_text(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _batches(items: Iterator[object]) -> Iterator[list[object]]:
    while batch := list(islice(items, _NUMBERS_AT_ONCE)):
        yield batch


def shown(text: object, instead: str = "…") -> str:
    """What a client has written, as a refusal of it says it; `instead`, if it is too long or no text."""
    return text if isinstance(text, str) and text.isprintable() and len(text) <= _SHOWN_CHARS else instead


def shape_of(path: str) -> ErrorShape:
    """The shape of the family that a path belongs to."""
    if path in LORAX_PATHS:
        return LORAX
    if path == "/api/jobs" or path.startswith("/api/jobs/"):
        return JOBS
    if path == "/v2" or path.startswith(("/api/", "/v2/")):
        return PLAIN
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return ANTHROPIC
    return OPENAI


def _plain_status(error: ServeError) -> int:
    return error.status


def _validation_is_422(error: ServeError) -> int:
    return 422 if isinstance(error, BadRequest) else error.status


def openai_body(error: ServeError) -> dict[str, object]:
    """{"error": {message, type, param, code}}; also what a frame of a broken stream holds."""
    return {
        "error": {
            "message": error.message,
            "type": _openai_type(error),
            "param": error.param,
            "code": error.code,
        }
    }


def _openai_type(error: ServeError) -> str:
    if error.status >= 500:
        return "server_error"
    by_status = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return by_status.get(error.status, "invalid_request_error")


def _jobs_status(error: ServeError) -> int:
    # A job that is there but of no use is 400 to TuneOS; what is wrong with the request itself is 422.
    is_about_job = isinstance(error, BadRequest) and error.param == "model"
    return 400 if is_about_job else _validation_is_422(error)


def _lorax_status(error: ServeError) -> int:
    # 424 is what LoRAX and TGI answer, and what their clients expect, when generation itself failed.
    if isinstance(error, AnswerIncomplete):
        return error.status
    return 424 if isinstance(error, EngineFailed) else _validation_is_422(error)


def lorax_body(error: ServeError) -> dict[str, object]:
    """{"error", "error_type"} with the words that LoRAX's clients turn into exceptions."""
    if isinstance(error, TemplateFailed):
        message = f"Failed applying chat template to inputs: {error.message}"
        return {"error": message, "error_type": "template_error"}
    if isinstance(error, BadRequest):
        return {"error": f"Input validation error: {error.message}", "error_type": "validation"}
    if isinstance(error, AnswerIncomplete):
        return {"error": "Incomplete generation", "error_type": "incomplete_generation"}
    if isinstance(error, EngineFailed):
        return {"error": f"Request failed during generation: {error.message}", "error_type": "generation"}
    if isinstance(error, Overloaded):
        return {"error": "Model is overloaded", "error_type": "overloaded"}
    if isinstance(error, ModelNotFound):
        return {"error": error.message, "error_type": "adapter_not_found"}
    return {"error": error.message, "error_type": error.code}


def anthropic_body(error: ServeError) -> dict[str, object]:
    """{"type", "error": {type, message}}; its `error` is also what the last event of a broken stream says."""
    return {"type": "error", "error": {"type": _anthropic_type(error), "message": error.message}}


def _anthropic_type(error: ServeError) -> str:
    by_status = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
    return by_status.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")


def _detail_body(error: ServeError) -> dict[str, object]:
    return {"detail": error.message}


def _error_body(error: ServeError) -> dict[str, object]:
    return {"error": error.message}


OPENAI = ErrorShape(_plain_status, openai_body, "OpenAI")
LORAX = ErrorShape(_lorax_status, lorax_body, "LoRAX")
JOBS = ErrorShape(_jobs_status, _detail_body, "Jobs")
ANTHROPIC = ErrorShape(_plain_status, anthropic_body, "Anthropic")
PLAIN = ErrorShape(_plain_status, _error_body, "Plain")
