"""The fields that choose adapters beside the name of the model, the same in every protocol that has them.

`lora` is llama.cpp's list of adapters with scales, by name; `adapter_source`, `api_token` and
`merged_adapters` are LoRAX's. What they may say together is settled here, and who may use what in access.py.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, TypeVar

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from adapters.recipes import MajoritySign, MergeMethod, MergeRecipe
from server.api.ports import ModelCard
from server.api.schema import Body
from server.api.shapes import shown
from server.errors import BadRequest
from server.wishes import AdapterWish, MergeWish, PartWish, Secret

MAX_ADAPTERS = 8  # of one request: all of them are on the device at the same time
MAX_SCALE = 100.0
_MAX_NAME_CHARS = 1024  # of a place, such as s3://bucket/prefix; names of adapters are shorter
_MAX_TOKEN_CHARS = 4096
_SOURCES = ("local", "hub", "s3")
_KNOWN_SOURCES = ("pbase",)  # to LoRAX's clients

E = TypeVar("E", bound=StrEnum)

Name = Annotated[str, Field(min_length=1, max_length=_MAX_NAME_CHARS)]
Scale = Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)]


def _secret(value: object) -> Secret | None:
    """So that the token is nowhere but here, and can be forgotten."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > _MAX_TOKEN_CHARS:
        raise PydanticCustomError(
            "token", "input should be a string of at most {most} characters", {"most": _MAX_TOKEN_CHARS}
        )
    return Secret(value)


Token = Annotated[
    Secret | None,
    PlainValidator(_secret),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "maxLength": _MAX_TOKEN_CHARS}, {"type": "null"}], "writeOnly": True}
    ),
]
Source = Annotated[
    str | None, WithJsonSchema({"anyOf": [{"type": "string", "enum": list(_SOURCES)}, {"type": "null"}]})
]


class LoraPart(Body):
    """One of several adapters that are applied at once."""

    name: Name
    scale: Scale | None = None  # None: 1


Lora = Annotated[list[LoraPart], Field(max_length=MAX_ADAPTERS)]


class AdapterFields(Body):
    """What bodies have beside the name of the model."""

    lora: Lora | None = None
    adapter_source: Source = None
    api_token: Token = None


class MergedAdapters(Body):
    """Adapters whose weights become one adapter's. Ranges are checked in LoRAX's words."""

    ids: list[Name]
    weights: list[float] | None = None  # None: 1 each
    merge_strategy: str | None = None
    density: float | None = None
    majority_sign_method: str | None = None


ADAPTER_NOTES: Mapping[str, str] = {
    "lora": "Several adapters at once, each with a scale (default 1), summed and unmerged; in place of the "
    "model's name, which may only be the base model's. A scale of 0 leaves an adapter out, an empty list is "
    "the base model.",
    "adapter_source": "Where the adapter is: `local` (default), `hub` or `s3`, if the server may look there.",
    "api_token": "For adapters that are not public. Used for this request, never kept or logged.",
}
"""On these fields, for the documentation."""

TWO_AT_ONCE: list[dict[str, object]] = [{"name": "pirate", "scale": 0.5}, {"name": "haiku", "scale": 0.8}]
"""`lora`, as examples have it."""


def adapter_wish(
    fields: AdapterFields,
    named: str | None,
    card: ModelCard,
    merged: MergedAdapters | None = None,
    *,
    name_param: str = "model",
) -> AdapterWish:
    """`named`: what the request calls its model, in `name_param`. Raises: BadRequest."""
    parts, merge = parts_of(fields.lora, named, card, name_param), None
    if merged is not None:
        if parts is not None:
            raise BadRequest("at most one of `lora` and `merged_adapters` may be provided", param="lora")
        merge = _merge(merged, card)
    return AdapterWish(_source(fields.adapter_source), fields.api_token, parts, merge)


def parts_of(
    lora: list[LoraPart] | None, named: str | None, card: ModelCard, name_param: str = "model"
) -> tuple[PartWish, ...] | None:
    """Raises: BadRequest."""
    if lora is None:
        return None
    if not card.is_base(named):
        raise BadRequest(
            f"lora lists all adapters of a request: {name_param} beside it can only be the base model",
            param="lora",
        )
    parts = []
    for number, part in enumerate(lora):
        param = f"lora[{number}].name"
        if card.is_base(part.name):
            raise BadRequest(f"{param}: the base model is always there and cannot be listed", param=param)
        parts.append(PartWish(part.name, 1.0 if part.scale is None else part.scale, param))
    return tuple(parts)


def _source(asked: str | None) -> str | None:
    if not asked:
        return None
    if asked in _KNOWN_SOURCES:
        raise BadRequest(f"adapter_source {asked} is not supported by this server", param="adapter_source")
    if asked not in _SOURCES:
        raise BadRequest(
            f"adapter_source: {shown(asked, 'this')} is not one of {', '.join(_SOURCES)}",
            param="adapter_source",
        )
    return asked


def _merge(merged: MergedAdapters, card: ModelCard) -> MergeWish:
    """In LoRAX's words, where it has any. Raises: BadRequest."""
    if not merged.ids:
        raise _wrong_merge("at least one adapter ID must be provided when setting `adapters`", "ids")
    if len(merged.ids) > MAX_ADAPTERS:
        raise _wrong_merge(f"`ids` supports up to {MAX_ADAPTERS} adapters. Given: {len(merged.ids)}", "ids")
    weights = merged.weights
    if weights is None:
        weights = [1.0] * len(merged.ids)
    if len(weights) != len(merged.ids):
        raise _wrong_merge("number of adapter IDs must match number of adapter weights", "weights")
    if not all(abs(weight) <= MAX_SCALE for weight in weights):
        raise _wrong_merge(f"`weights` must be >= -{MAX_SCALE} and <= {MAX_SCALE}", "weights")
    if any(card.is_base(name) for name in merged.ids):
        raise _wrong_merge("base model adapter cannot be merged", "ids")
    method = _one_of(MergeMethod, merged.merge_strategy or MergeMethod.LINEAR, "merge_strategy")
    sign = _one_of(MajoritySign, merged.majority_sign_method or MajoritySign.TOTAL, "majority_sign_method")
    density = 1.0 if merged.density is None and not method.drops_some else merged.density
    if density is None or not 0 <= density <= 1 or (density == 0 and method.drops_some):
        given = "" if density is None else f". Given: {density:g}"
        low = ">" if method.drops_some else ">="
        raise _wrong_merge(f"`density` must be {low} 0.0 and <= 1.0 with {method}{given}", "density")
    return MergeWish(tuple(merged.ids), MergeRecipe(tuple(weights), method, density, sign))


def _one_of(words: type[E], asked: str, member: str) -> E:
    try:
        return words(asked)
    except ValueError:
        raise _wrong_merge(f"`{member}` must be one of {', '.join(words)}", member) from None


def _wrong_merge(message: str, member: str) -> BadRequest:
    return BadRequest(message, param=f"merged_adapters.{member}")
