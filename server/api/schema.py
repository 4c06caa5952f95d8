"""What the schemas of all protocols share: strictness, and refusals that name the parameter.

Types are strict ("5" is not an int, true is not a number), an explicit null means "not given", unknown fields
are ignored. A field that exists in the protocol but is not served has an entry in a table of neutral values
instead: any other value is refused by name, because ignoring it would answer something else than what was
asked for.
"""

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, WithJsonSchema

from server.errors import BadRequest

MAX_STOP_CHARS = 1024  # a longer stop string would cost more to look for than the text it might end
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
MAX_INT = 2**31 - 1

M = TypeVar("M", bound="Body")

StopStrings = Annotated[
    object,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}},
                {"type": "null"},
            ]
        }
    ),
]
"""`stop` in a body; `stop_strings` looks inside."""


class Body(BaseModel):
    """Base of all schemas."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, protected_namespaces=())


def validate(schema: type[M], body: dict[str, object], where: str = "") -> M:
    """`where`: what the body is the value of. Raises: BadRequest that names the first wrong parameter."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _path((where, *first["loc"]) if where else first["loc"])
        message = first["msg"]
        raise BadRequest(f"{param}: {message[:1].lower()}{message[1:]}", param=param) from None


def refuse_unsupported(
    body: dict[str, object], neutral: Mapping[str, tuple[object, ...]], within: str = ""
) -> None:
    """Raises: BadRequest for a known parameter that is not served, unless its value asks for nothing.

    `within`: what the parameter is a member of, with a dot.
    """
    for name in body.keys() & neutral.keys():
        value = body[name]
        if value is not None and not any(_is_same(value, other) for other in neutral[name]):
            param = f"{within}{name}"
            raise BadRequest(f"{param} is not supported by this server", param=param)


def refuse_members(body: dict[str, object], name: str, neutral: Mapping[str, tuple[object, ...]]) -> None:
    """The same for the members of one parameter, which must be an object. Raises: BadRequest."""
    value = body.get(name)
    if value is None:
        return
    if not isinstance(value, dict):
        raise BadRequest(f"{name}: input should be an object", param=name)
    refuse_unsupported(value, neutral, f"{name}.")


def stop_strings(value: object, limit: int, param: str = "stop") -> tuple[str, ...]:
    """`stop` as a string, a list of strings or null. Raises: BadRequest."""
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise BadRequest(f"{param}: input should be a string or a list of strings", param=param)
    if len(strings) > limit:
        raise BadRequest(
            f"`{param}` supports up to {limit} stop sequences. Given: {len(strings)}", param=param
        )
    for i, string in enumerate(strings):
        if not isinstance(string, str):
            raise BadRequest(f"{param}[{i}]: input should be a valid string", param=f"{param}[{i}]")
        if not 0 < len(string) <= MAX_STOP_CHARS:
            raise BadRequest(f"a stop string must have 1 to {MAX_STOP_CHARS} characters", param=param)
    return tuple(strings)


def _is_same(value: object, other: object) -> bool:
    return type(value) is type(other) and value == other  # True == 1 is not meant


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> messages[0].role"""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "body"
