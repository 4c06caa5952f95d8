"""What Anthropic's routes are documented as."""

from typing import Literal

from typing_extensions import TypedDict

from server.api.anthropic.schema import NEUTRAL, CountBody, MessagesBody
from server.api.docs.operations import (
    EVENTS,
    GENERATING,
    JSON,
    READING,
    Answer,
    Chapter,
    Operation,
    json_answer,
)
from server.errors import ContextTooLong, ModelNotFound, Unavailable

StopReason = Literal["max_tokens", "model_context_window_exceeded", "stop_sequence", "end_turn"]


class TextBlock(TypedDict):
    type: Literal["text"]
    text: str


class MessageUsage(TypedDict):
    """Tokens out of the prefix cache are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(TypedDict):
    """An answer, whole; at the beginning of a stream without content."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: AnthropicMessage


class ContentBlockStart(TypedDict):
    type: Literal["content_block_start"]
    index: int
    content_block: TextBlock


class TextDelta(TypedDict):
    type: Literal["text_delta"]
    text: str


class ContentBlockDelta(TypedDict):
    """A piece of text."""

    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta


class ContentBlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: int


class StopDelta(TypedDict):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(TypedDict):
    """How the message ended, and what it cost."""

    type: Literal["message_delta"]
    delta: StopDelta
    usage: MessageUsage


class MessageStop(TypedDict):
    type: Literal["message_stop"]


class Ping(TypedDict):
    """Sent into silence."""

    type: Literal["ping"]


class TokenCount(TypedDict):
    input_tokens: int


_HELLO = [{"role": "user", "content": "What is a motet?"}]
_USAGE = {
    "input_tokens": 12,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 2,
}
_END = {"stop_reason": "end_turn", "stop_sequence": None}

CHAPTER = Chapter(
    tag="Anthropic",
    about="Anthropic's Messages routes. `model` names an adapter or the base model.",
    operations=(
        Operation(
            "POST",
            "/v1/messages",
            "Answer a chat",
            (
                Answer(
                    JSON,
                    AnthropicMessage,
                    "The whole answer.",
                    {
                        "id": "msg_1",
                        "type": "message",
                        "role": "assistant",
                        "model": "motet",
                        "content": [{"type": "text", "text": "Several voices"}],
                        **_END,
                        "usage": _USAGE,
                    },
                ),
                Answer(
                    EVENTS,
                    MessageStart
                    | ContentBlockStart
                    | ContentBlockDelta
                    | ContentBlockStop
                    | MessageDelta
                    | MessageStop
                    | Ping,
                    "With `stream`: named events that build it.",
                    (
                        {
                            "type": "content_block_delta",
                            "index": 0,
                            "delta": {"type": "text_delta", "text": "Several"},
                        },
                        {"type": "message_delta", "delta": _END, "usage": _USAGE},
                        {"type": "message_stop"},
                    ),
                    has_event_names=True,
                ),
            ),
            body=MessagesBody,
            examples={
                "A stream": {"model": "default", "max_tokens": 64, "messages": _HELLO, "stream": True},
                "Whole, with a system text": {
                    "model": "default",
                    "max_tokens": 32,
                    "system": "Answer in one sentence.",
                    "messages": _HELLO,
                },
                "An answer that is begun": {
                    "model": "default",
                    "max_tokens": 32,
                    "messages": [*_HELLO, {"role": "assistant", "content": "A motet is"}],
                },
            },
            refusals=GENERATING,
            is_generation=True,
        ),
        Operation(
            "POST",
            "/v1/messages/count_tokens",
            "Count the tokens of a prompt",
            json_answer(TokenCount, "The tokens that the model would be given.", {"input_tokens": 12}),
            body=CountBody,
            examples={"A chat": {"model": "default", "messages": _HELLO}},
            refusals=(*READING, ContextTooLong, ModelNotFound, Unavailable),
        ),
    ),
    neutral={MessagesBody: NEUTRAL, CountBody: NEUTRAL},
    notes={
        MessagesBody: {
            "model": "An adapter, or a name of the base model.",
            "max_tokens": "An upper bound; where the context leaves less, less is generated.",
        }
    },
)
