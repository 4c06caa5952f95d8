"""What we answer, read by the OpenAI SDK's own models without their usual leniency: a wrong type, a missing
member and one that the models do not know are errors.
"""

import json
from typing import Any, TypeVar

from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

T = TypeVar("T")

_SENT_BY_OPENAI = {"store"}  # and not in the SDK's models
_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def strictly(model: type[T], value: object) -> T:
    """The value as a `model`, or an error."""
    parsed = TypeAdapter(model).validate_python(value, strict=True)
    _refuse_unknown(parsed)
    return parsed


def events_of(stream: str) -> list[Any]:
    """The events of a `/v1/responses` stream: both names of each must be equal, the numbers without gaps."""
    events = []
    for frame in stream.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        event = _EVENTS.validate_python(json.loads(data.removeprefix("data: ")), strict=True)
        _refuse_unknown(event)
        assert name == f"event: {event.type}"
        assert event.sequence_number == len(events)
        events.append(event)
    return events


def _refuse_unknown(value: object) -> None:
    if isinstance(value, BaseModel):
        unknown = set(value.model_extra or {}) - _SENT_BY_OPENAI
        assert not unknown, f"{type(value).__name__} does not know {unknown}"
        for name in type(value).model_fields:
            _refuse_unknown(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            _refuse_unknown(item)
