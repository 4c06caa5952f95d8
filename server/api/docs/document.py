"""The OpenAPI 3.1 document: the table of routes, and what the chapters say about them.

Schemas are pydantic's own, of the models that validate bodies and of the TypedDicts that answers have. What a
route says when it refuses is taken from the code that will say it: the shape of its path writes each of its
errors, and the schema of a shape is read off everything that it can write. OpenAPI 3.1 has no word for the
frames of a stream, so their schema is under `x-itemSchema`, as version 3.2 will call it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from server.api.docs.operations import EVENTS, FORM, JSON, Answer, Chapter, Neutral, Operation, Parameter
from server.api.headers import EXPOSED_HEADERS, HEADER_NOTES, ON_ALL_HEADERS, ON_WHOLE_HEADERS
from server.api.schema import Body
from server.api.shapes import ErrorShape, json_text, shape_of
from server.errors import ServeError, Unauthorized

_REF = "#/components/schemas/{model}"
_ABOUT = """One server, many LoRA adapters over one base model, many protocols. An adapter is chosen by its
name: as `model`, `adapter_id`, a job id or a part of the path, whatever the protocol calls it. Names of the
base model are its served names, `default` and a few more; a name that nothing has is a 404, never the base.

Answers of generation carry `x-` headers; those of a stream are sent with its first token, so that
`x-compute-time` is the server's time to first token. A null in a body means that the field is not given, and
unknown fields are ignored; fields that are known but not served are refused by name unless their value asks
for nothing.
"""
_PATH_PARAMETER = re.compile(r"\{(\w+)(:\w+)?\}")
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "query": {
        "type": "apiKey",
        "in": "query",
        "name": "api_key",
        "description": "For clients that cannot set headers, as EventSource.",
    },
}

T = TypeVar("T")

Object = dict[str, Any]
Table = Sequence[tuple[str, tuple[str, ...]]]
"""Paths as in the table of routes, with their methods."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One operation at one path."""

    path: str  # as OpenAPI writes it
    operation: Operation
    chapter: Chapter

    @property
    def id(self) -> str:
        words = re.findall(r"\w+", self.path) or ["root"]
        return "_".join([self.operation.method.lower(), *words])


def undescribed(table: Table, chapters: Iterable[Chapter]) -> set[tuple[str, str]]:
    """Methods and paths without an operation, and operations without a route."""
    routed = {(method, open_path(path)) for path, methods in table for method in methods}
    described = {(entry.operation.method, entry.path) for entry in _entries(chapters)}
    return routed ^ {(str(method), path) for method, path in described}


def open_path(path: str) -> str:
    """A path of the table of routes as OpenAPI writes it: `{id:path}` is `{id}`."""
    return _PATH_PARAMETER.sub(r"{\1}", path)


def document(table: Table, chapters: Sequence[Chapter], *, version: str, asks_for_key: bool) -> Object:
    """The whole document, as JSON values. Takes some 100 ms: not on the event loop."""
    routed = {(method, open_path(path)) for path, methods in table for method in methods}
    entries = [entry for entry in _entries(chapters) if (entry.operation.method, entry.path) in routed]
    schemas = _Schemas(entries)
    paths: dict[str, Object] = {}
    for entry in entries:
        paths.setdefault(entry.path, {})[entry.operation.method.lower()] = _operation(entry, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Motet", "version": version, "description": _ABOUT},
        "servers": [{"url": "./", "description": "this server"}],
        "security": [*({name: []} for name in _SECURITY), *(() if asks_for_key else ({},))],
        "tags": [{"name": chapter.tag, "description": chapter.about} for chapter in chapters],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.components.items())),
            "headers": {name: _header(name) for name in EXPOSED_HEADERS},
            "securitySchemes": _SECURITY,
        },
    }


def _entries(chapters: Iterable[Chapter]) -> list[_Entry]:
    entries: list[_Entry] = []
    for chapter in chapters:
        for operation in chapter.operations:
            paths = (operation.paths,) if isinstance(operation.paths, str) else operation.paths
            entries += [_Entry(open_path(path), operation, chapter) for path in paths]
    return entries


class _Schemas:
    """The schemas of all types that the operations name, described together so that each has one name."""

    def __init__(self, entries: Sequence[_Entry]) -> None:
        # By identity: what an operation names stays where it is for as long as the chapters do.
        wanted = {id(schema): (mode, schema) for entry in entries for mode, schema in _types(entry)}
        inputs = [(key, mode, TypeAdapter[Any](schema)) for key, (mode, schema) in wanted.items()]
        found, definitions = TypeAdapter.json_schemas(
            inputs, ref_template=_REF, schema_generator=_WithoutTitles
        )
        self._by_id, self.components = _with_our_names(
            {key: schema for (key, _), schema in found.items()}, dict(definitions.get("$defs", {}))
        )
        for chapter in {id(entry.chapter): entry.chapter for entry in entries}.values():
            self._annotate(chapter)
        for shape in {shape_of(entry.path).name: shape_of(entry.path) for entry in entries}.values():
            self.components[_error_name(shape)] = _error_schema(shape)

    def of(self, schema: object) -> Object:
        return dict(self._by_id[id(schema)])

    def _annotate(self, chapter: Chapter) -> None:
        """Add what the chapter says about the fields of its bodies."""
        for model, fields in chapter.neutral.items():
            self.components[schema_name(model)]["properties"].update(_not_served(fields))
        for model, notes in chapter.notes.items():
            for name, note in notes.items():
                self.components[schema_name(model)]["properties"][name]["description"] = note


class _WithoutTitles(GenerateJsonSchema):
    """Names that are the field's own name once more only make a document longer."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_name(model: type[BaseModel]) -> str:
    """Of a body: its own, with the protocol's in front, as several protocols have a `ChatBody`."""
    package, _, _ = model.__module__.rpartition(".")
    protocol = package.rpartition(".")[2].title()
    return model.__name__ if model.__name__.startswith(protocol) else protocol + model.__name__


def _with_our_names(
    schemas: dict[int, Object], components: dict[str, Object]
) -> tuple[dict[int, Object], dict[str, Object]]:
    """The same with `schema_name`s for all bodies. pydantic's own names have the module in front where two
    are equal.
    """
    names = {}
    for model in _below(Body):
        long = f"{model.__module__}.{model.__name__}".replace(".", "__")
        names[long if long in components else model.__name__] = schema_name(model)
    as_text = re.compile(r'"#/components/schemas/(\w+)"')

    def renamed(schema: Object) -> Object:
        text = json_text(schema)
        return dict(json.loads(as_text.sub(lambda m: f'"{_REF.format(model=names.get(m[1], m[1]))}"', text)))

    return (
        {key: renamed(schema) for key, schema in schemas.items()},
        {names.get(name, name): renamed(schema) for name, schema in components.items()},
    )


def _below(kind: type[T]) -> set[type[T]]:
    """The type and all that derive from it."""
    return {kind}.union(*(_below(sub) for sub in kind.__subclasses__()))


def _not_served(fields: Neutral) -> Object:
    """The schemas of fields that are known and not served."""
    about = "Not served: only values that ask for nothing are accepted."
    return {
        name: {"type": ["object", "null"], "properties": _not_served(values)}
        if isinstance(values, Mapping)
        else {"description": about, "enum": _distinct(None, *values)}
        for name, values in sorted(fields.items())
    }


def _distinct(*values: object) -> list[object]:
    """Without those that are equal in JSON, as 1 and 1.0 are."""
    as_json = {
        json_text(int(value) if isinstance(value, float) and value.is_integer() else value): value
        for value in reversed(values)
    }
    return list(reversed(as_json.values()))


def _types(entry: _Entry) -> Iterable[tuple[JsonSchemaMode, Any]]:
    operation = entry.operation
    if operation.body is not None:
        yield "validation", operation.body
    if operation.form is not None:
        yield "validation", operation.form
    for parameter in operation.parameters:
        yield "validation", parameter.schema
    for answer in operation.answers:
        yield "serialization", answer.schema
        if answer.failure is not None:
            yield "serialization", answer.failure


# --- One operation ----------------------------------------------------------------------------------------


def _operation(entry: _Entry, schemas: _Schemas) -> Object:
    operation = entry.operation
    written: Object = {
        "operationId": entry.id,
        "summary": operation.summary,
        "tags": [entry.chapter.tag],
        "responses": {**_answers(entry, schemas), **_refusals(entry)},
    }
    if operation.about:
        written["description"] = operation.about
    if parameters := _parameters(entry, schemas):
        written["parameters"] = parameters
    if operation.body is not None:
        content: Object = {"schema": schemas.of(operation.body)}
        if operation.examples:
            content["examples"] = {
                _slug(summary): {"summary": summary, "value": value}
                for summary, value in operation.examples.items()
            }
        body: Object = {"required": operation.is_body_required, "content": {JSON: content}}
        if operation.form is not None:
            body["content"][FORM] = {"schema": schemas.of(operation.form)}
        written["requestBody"] = body
    if operation.is_open:
        written["security"] = []
    return written


def _parameters(entry: _Entry, schemas: _Schemas) -> list[Object]:
    said = {parameter.name: parameter for parameter in entry.operation.parameters}
    in_path = [name for name, _ in _PATH_PARAMETER.findall(entry.path)]
    result: list[Object] = []
    for name in in_path:
        parameter = said.get(name) or Parameter(name, "", where="path")
        schema = schemas.of(parameter.schema) if name in said else {"type": "string"}
        result.append(_parameter(parameter, schema, is_required=True))
    for parameter in said.values():
        if parameter.where != "path":
            result.append(_parameter(parameter, schemas.of(parameter.schema), parameter.is_required))
    return result


def _parameter(parameter: Parameter, schema: Object, is_required: bool) -> Object:
    written: Object = {
        "name": parameter.name,
        "in": parameter.where,
        "required": is_required,
        "schema": schema,
    }
    if parameter.about:
        written["description"] = parameter.about
    if parameter.example is not None:
        written["example"] = parameter.example
    return written


def _answers(entry: _Entry, schemas: _Schemas) -> Object:
    responses: dict[str, Object] = {}
    for answer in entry.operation.answers:
        response = responses.setdefault(
            str(answer.status), {"description": "", "headers": _headers(entry.operation), "content": {}}
        )
        response["description"] = " ".join(filter(None, (response["description"], answer.about)))
        response["content"][answer.media_type] = _content(answer, entry, schemas)
    return responses


def _content(answer: Answer, entry: _Entry, schemas: _Schemas) -> Object:
    if not answer.is_stream:
        content: Object = {"schema": schemas.of(answer.schema)}
        if answer.example is not None:
            content["example"] = answer.example
        return content
    shapes = answer.shapes or (shape_of(entry.path),)
    failures = [{"$ref": _REF.format(model=_error_name(shape))} for shape in shapes]
    if answer.failure is not None:
        failures = [schemas.of(answer.failure)]
    content = {
        "schema": {"type": "string", "contentMediaType": answer.media_type},
        "x-itemSchema": {"anyOf": [schemas.of(answer.schema), *failures]},
    }
    if answer.end is not None:
        content["x-end" if answer.is_end_certain else "x-possible-end"] = answer.end
    if isinstance(answer.example, tuple):
        content["example"] = stream_text(answer)
    return content


def stream_text(answer: Answer) -> str:
    """The example of a stream as it goes over the wire."""
    assert isinstance(answer.example, tuple)
    written = [json_text(frame) for frame in answer.example]
    if answer.media_type != EVENTS:
        return "".join(f"{frame}\n" for frame in written)
    names = [f"event: {frame['type']}\n" if answer.has_event_names else "" for frame in answer.example]
    events = [f"{name}data: {frame}\n\n" for name, frame in zip(names, written, strict=True)]
    return "".join([*events, f"data: {answer.end}\n\n" if answer.end is not None else ""])


# --- Headers ----------------------------------------------------------------------------------------------


def _headers(operation: Operation) -> Object:
    names: tuple[str, ...] = ("x-request-id",)
    if operation.is_generation:
        can_be_whole = any(not answer.is_stream for answer in operation.answers)
        names = (*ON_ALL_HEADERS, *(ON_WHOLE_HEADERS if can_be_whole else ()))
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _header(name: str) -> Object:
    kind, note = HEADER_NOTES[name]
    return {"description": note, "schema": {"type": kind}}


# --- Refusals ---------------------------------------------------------------------------------------------


def _refusals(entry: _Entry) -> Object:
    """Each status that the operation may refuse with, as the shape of its path writes it."""
    kinds = entry.operation.refusals
    if not entry.operation.is_open:
        kinds = (*kinds, Unauthorized)
    shape = shape_of(entry.path)
    by_status: dict[int, list[ServeError]] = {}
    for kind in kinds:
        error = kind(_sentence(kind))
        by_status.setdefault(shape.status(error), []).append(error)
    return {str(status): _refusal(shape, errors) for status, errors in sorted(by_status.items())}


def _refusal(shape: ErrorShape, errors: Sequence[ServeError]) -> Object:
    headers = ["x-request-id", *(["retry-after"] if any(e.status in (429, 503) for e in errors) else [])]
    return {
        "description": " ".join(f"{error.message}." for error in errors),
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
        "content": {
            JSON: {
                "schema": {"$ref": _REF.format(model=_error_name(shape))},
                "examples": {type(error).__name__: {"value": shape.body(error)} for error in errors},
            }
        },
    }


def _sentence(kind: type[ServeError]) -> str:
    """The first sentence of what an error means."""
    text = re.sub(r"\s+", " ", (kind.__doc__ or kind.code.replace("_", " ")).strip())
    return text.partition(". ")[0].rstrip(".")


def _error_name(shape: ErrorShape) -> str:
    return f"{shape.name}Error"


def _error_schema(shape: ErrorShape) -> Object:
    """What a shape can write, read off its answers to every kind of error."""
    kinds = sorted(_below(ServeError), key=lambda kind: kind.__name__)
    bodies = [
        [shape.body(kind(message, param=param)) for kind in kinds for param in (None, "field")]
        for message in ("one", "two")
    ]
    return _schema_of(bodies[0], bodies[1])


def _schema_of(values: Sequence[Any], others: Sequence[Any]) -> Object:
    """The schema of JSON values that errors with one message gave, and with another: what differs is free
    text, what does not is a word out of a list.
    """
    if all(isinstance(value, dict) for value in values):
        names = list(dict.fromkeys(name for value in values for name in value))
        return {
            "type": "object",
            "required": [name for name in names if all(name in value for value in values)],
            "properties": {
                name: _schema_of(*([v[name] for v in side if name in v] for side in (values, others)))
                for name in names
            },
        }
    present = {value for value in values if value is not None}
    assert all(isinstance(value, str) for value in present), "errors are objects of texts and nulls"
    has_null = len(present) < len(set(values))
    schema: Object = {"type": ["string", "null"] if has_null else "string"}
    if not has_null and list(values) == list(others):
        schema["enum"] = sorted(present)
    return schema


def _slug(text: str) -> str:
    return "-".join(re.findall(r"\w+", text.lower()))
