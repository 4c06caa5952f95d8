"""Bodies of `/v1/responses`: OpenAI's fields, and the sampling fields of the other OpenAI routes.

`input` and the parts of its items are looked into by responses.py, because an item's type decides what may be
in it.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from server.api.openai.schema import MAX_MESSAGES, Content, GenerationBody
from server.api.schema import MAX_INT, Body

ShortKey = Annotated[str, Field(max_length=64)]
ShortText = Annotated[str, Field(max_length=512)]


class ItemBody(Body):
    """One message of `input`. Without a `type` it is a message as well."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class ResponsesBody(GenerationBody):
    """`POST /v1/responses`"""

    input: str | Annotated[list[dict[str, object]], Field(min_length=1, max_length=MAX_MESSAGES)]
    include: Annotated[list[ShortKey], Field(max_length=64)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    max_tool_calls: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[ShortKey, ShortText], Field(max_length=16)] | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: ShortText | None = None
    service_tier: ShortText | None = None
    user: ShortText | None = None


NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "access_programs": (),
    "background": (False,),
    "cache_salt": (),
    "context_management": ([],),
    "conversation": (),
    "image": ({},),
    "max_tokens": (),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prompt": (),
    "response_format": (),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Known to clients of this route, not served: the values that ask for nothing. Null always does."""

ABSENT_PARTS = frozenset(
    (
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    )
)
"""What `include` may ask for: parts of items that there never are here, so that asking changes nothing."""

REASONING_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "context": ("auto",),
    "effort": ("none",),
    "generate_summary": (),
    "mode": ("standard",),
    "summary": (),
}
"""Members of `reasoning`."""

TEXT_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "format": ({"type": "text"},),
    "verbosity": ("medium",),
}
"""Members of `text`."""
