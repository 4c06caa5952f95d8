"""Bodies of Ollama's routes.

Ollama reads every number as a float first, so 40.0 is an integer here. What only says how Ollama's own runner
is to be started (num_batch, num_gpu, use_mmap and the like) means nothing here and is ignored as unknown
fields are.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.api.adapter_fields import Lora
from server.api.schema import MAX_INT, MAX_SEED, MIN_SEED, Body, StopStrings

MAX_MESSAGES = 16 * 1024  # all are validated in one go, which lets no other thread run
_MAX_NAME_CHARS = 512


def _whole_number(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = BeforeValidator(_whole_number)
Int = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT), _Whole]
ModelName = Annotated[str, Field(max_length=_MAX_NAME_CHARS)]
KeepAlive = Annotated[object, WithJsonSchema({"type": ["number", "string", "null"]})]
Texts = Annotated[
    object,
    WithJsonSchema({"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "string"}}]}),
]


class Options(Body):
    """`options` of a request; `stop` is looked into elsewhere."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Int | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=MAX_INT), _Whole] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED), _Whole] | None = None
    num_predict: Int | None = None
    num_ctx: Annotated[int, Field(ge=1, le=MAX_INT), _Whole] | None = None
    num_keep: Int | None = None
    stop: StopStrings = None
    lora: Lora | None = None  # several adapters at once, each with a scale; Ollama has nothing like it


class GenerationBody(Body):
    """What `/api/generate` and `/api/chat` both take."""

    model: ModelName | None = None
    stream: bool | None = None  # None: true
    options: Options | None = None
    keep_alive: KeepAlive = None
    truncate: bool | None = None  # None: true, a prompt that is too long is shortened
    logprobs: bool | None = None
    top_logprobs: Int | None = None


class GenerateBody(GenerationBody):
    """`POST /api/generate`"""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    context: list[int] | None = None


class Message(Body):
    """One turn of `POST /api/chat`."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[object] | None = None
    tool_calls: Annotated[list[dict[str, object]], Field(max_length=1024)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatBody(GenerationBody):
    """`POST /api/chat`"""

    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)] | None = None


class EmbedBody(Body):
    """`POST /api/embed`; embed.py looks inside `input`."""

    model: ModelName | None = None
    input: Texts = None
    truncate: bool | None = None  # None: true, a text that is too long is shortened
    dimensions: Annotated[int, Field(ge=0, le=MAX_INT), _Whole] | None = None
    options: Options | None = None
    keep_alive: KeepAlive = None


class EmbeddingsBody(Body):
    """`POST /api/embeddings`"""

    model: ModelName | None = None
    prompt: str | None = None
    options: Options | None = None
    keep_alive: KeepAlive = None


class NamedBody(Body):
    """`POST /api/show` and `/api/pull`; `name` is what older clients call the model."""

    model: ModelName | None = None
    name: ModelName | None = None
    stream: bool | None = None


_COMMON: Mapping[str, tuple[object, ...]] = {
    "_debug_render_only": (False,),
    "format": ("",),
    "runner": ("",),
    "think": (False,),
    "tools": ([],),
}

CHAT_NEUTRAL: Mapping[str, tuple[object, ...]] = _COMMON
"""Known to clients, not served: the values that ask for nothing. Null always does."""

GENERATE_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **_COMMON,
    "height": (0,),
    "images": ([],),
    "steps": (0,),
    "suffix": ("",),
    "template": ("",),
    "width": (0,),
}

OPTIONS_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "mirostat": (0, 0.0),
    "tfs_z": (1, 1.0),
}
"""Of `options`: samplers of older releases."""
