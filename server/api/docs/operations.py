"""The records in which a protocol describes its routes; document.py makes the document of them.

A protocol has a `Chapter` in its chapter.py: one `Operation` per method and path of the table in its
routes.py (a test finds those that are missing), the forms of its answers as TypedDicts, and examples.
Everything that the code already knows is not said again: bodies are the pydantic models that validate them,
values that are refused come from the tables of neutral values, errors from the `ServeError`s and the shape of
the path, `x-` headers from headers.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from server.api.shapes import ErrorShape
from server.errors import (
    BadRequest,
    ContextTooLong,
    EngineFailed,
    Forbidden,
    ModelNotFound,
    Overloaded,
    PayloadTooLarge,
    ServeError,
    Unavailable,
)

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
JSON = "application/json"
TEXT = "text/plain"
FORM = "multipart/form-data"

Refusals = tuple[type[ServeError], ...]

Neutral = Mapping[str, tuple[object, ...] | Mapping[str, tuple[object, ...]]]
"""The values that ask for nothing, of fields or of their members that are known and not served."""

READING: Refusals = (BadRequest, PayloadTooLarge)
"""What any route may say that reads a body."""

GENERATING: Refusals = (*READING, ContextTooLong, ModelNotFound, Overloaded, EngineFailed, Unavailable)
"""What any route may say that generates."""

ADMINISTERING: Refusals = (*READING, Forbidden, Unavailable)
"""What any route may say that changes the server."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One form of what an operation answers when all is well."""

    media_type: str
    schema: object  # any type that pydantic describes; of a stream: of the JSON of each frame
    about: str
    example: object = None  # of a stream: a tuple of frames; None: none
    status: int = 200
    end: str | None = None  # what a stream sends last, if that is no JSON
    is_end_certain: bool = True
    has_event_names: bool = False  # each event has a line `event:` with the `type` of its JSON
    failure: object = None  # of a stream: the frame of one that breaks; None: an error in one of `shapes`
    shapes: tuple[ErrorShape, ...] = ()  # (): that of the path

    @property
    def is_stream(self) -> bool:
        return self.media_type in (EVENTS, LINES)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One value outside of the body. Those of a path need one only where there is something to say."""

    name: str
    about: str
    where: Literal["path", "query", "header"] = "query"
    schema: object = str
    is_required: bool = False
    example: object = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one or more paths."""

    method: Literal["GET", "POST", "DELETE", "PUT", "PATCH"]
    paths: str | tuple[str, ...]  # as in the table of routes
    summary: str  # a few words
    answers: tuple[Answer, ...]
    about: str = ""  # Markdown
    body: Any = None  # a model, or several of them with | between
    form: Any = None  # what the body is as multipart/form-data, where that is another way to say it
    is_body_required: bool = True
    examples: Mapping[str, dict[str, object]] = field(default_factory=dict)  # bodies, by what they show
    parameters: tuple[Parameter, ...] = ()
    refusals: Refusals = ()
    is_generation: bool = False  # answers carry the x- headers
    is_open: bool = False  # needs no key


@dataclass(frozen=True, slots=True)
class Chapter:
    """One protocol's part of the document."""

    tag: str
    about: str
    operations: tuple[Operation, ...]
    neutral: Mapping[type[BaseModel], Neutral] = field(default_factory=dict)
    notes: Mapping[type[BaseModel], Mapping[str, str]] = field(default_factory=dict)  # on fields, by name


def json_answer(schema: object, about: str, example: object = None) -> tuple[Answer, ...]:
    """For routes that answer JSON and nothing else."""
    return (Answer(JSON, schema, about, example),)


def text_answer(about: str, example: str) -> tuple[Answer, ...]:
    """For routes that answer plain text."""
    return (Answer(TEXT, str, about, example),)
