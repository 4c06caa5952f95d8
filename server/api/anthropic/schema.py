"""Bodies of Anthropic's Messages routes."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from server.api.openai.schema import MAX_MESSAGES, Content
from server.api.schema import MAX_INT, Body, StopStrings


class Turn(Body):
    """One message. `content` is a string or blocks; messages.py looks inside."""

    role: Literal["user", "assistant"]
    content: Content


class Metadata(Body):
    """Of the request; nothing depends on it."""

    user_id: str | None = None


class CountBody(Body):
    """`POST /v1/messages/count_tokens`: what the prompt is made of."""

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Content = None


class MessagesBody(CountBody):
    """`POST /v1/messages`"""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    stop_sequences: StopStrings = None
    metadata: Metadata | None = None


NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "container": (),
    "context_management": ({},),
    "mcp_servers": ([],),
    "output_config": ({},),
    "output_format": (),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "thinking": ({"type": "disabled"},),
    "tool_choice": ({"type": "auto"}, {"type": "none"}),
    "tools": ([],),
}
"""Known to clients of this route, not served: the values that ask for nothing. Null always does."""
