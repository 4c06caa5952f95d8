"""What `/v1/responses` is documented as: the object, the events of a stream, and what is kept."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from server.api.adapter_fields import ADAPTER_NOTES
from server.api.docs.operations import (
    EVENTS,
    GENERATING,
    JSON,
    Answer,
    Chapter,
    Operation,
    Parameter,
    json_answer,
)
from server.api.openai.schema import StreamOptions
from server.api.responses.schema import NEUTRAL, REASONING_NEUTRAL, TEXT_NEUTRAL, ResponsesBody
from server.errors import BadRequest, PreviousResponseNotFound, ResponseNotFound

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(TypedDict):
    """The one part of an answer."""

    type: Literal["output_text"]
    annotations: list[dict[str, object]]
    logprobs: list[dict[str, object]]
    text: str


class OutputMessage(TypedDict):
    """The one item of an answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(TypedDict):
    code: str
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class Reasoning(TypedDict):
    effort: str | None
    summary: str | None


class TextFormat(TypedDict):
    type: Literal["text"]


class TextSettings(TypedDict):
    format: TextFormat
    verbosity: str


class Response(TypedDict):
    """An answer and what was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    completed_at: int | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage | None
    output: list[OutputMessage]
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    reasoning: Reasoning
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: TextSettings
    tool_choice: str
    tools: list[dict[str, object]]
    top_logprobs: int
    top_p: float
    truncation: str
    user: str | None


class Numbered(TypedDict):
    sequence_number: int


class ResponseEvent(Numbered):
    """The whole object, at the beginning and at the end."""

    type: Literal["response.created", "response.in_progress", "response.completed", "response.incomplete"]
    response: Response


class ResponseFailedEvent(Numbered):
    """The end of a stream that breaks."""

    type: Literal["response.failed"]
    response: Response


class OutputItemEvent(Numbered):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputMessage


class Place(Numbered):
    item_id: str
    output_index: int
    content_index: int


class ContentPartEvent(Place):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class OutputTextDelta(Place):
    """A piece of text."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[dict[str, object]]
    obfuscation: NotRequired[str]


class OutputTextDone(Place):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[dict[str, object]]


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputText(TypedDict):
    type: Literal["input_text"]
    text: str


class InputItem(TypedDict):
    """A message that went into the model."""

    id: str
    type: Literal["message"]
    status: Literal["completed"]
    role: Literal["user", "assistant", "system", "developer"]
    content: list[InputText | OutputText]


class InputItemList(TypedDict):
    object: Literal["list"]
    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


_PART = {"type": "output_text", "annotations": [], "logprobs": [], "text": "Several voices"}
_RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1764000000,
    "status": "completed",
    "completed_at": 1764000001,
    "error": None,
    "incomplete_details": None,
    "usage": {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 14,
    },
    "output": [
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [_PART]}
    ],
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "model": "motet",
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
_DELTA = {
    "type": "response.output_text.delta",
    "sequence_number": 4,
    "item_id": "msg_1",
    "output_index": 0,
    "content_index": 0,
    "delta": "Several",
    "logprobs": [],
}
_ID = Parameter("id", "The id of a response that this key has made.", where="path", example="resp_1")

CHAPTER = Chapter(
    tag="Responses",
    about="OpenAI's newer route. Responses are kept in memory, within bounds, for the key that made them.",
    operations=(
        Operation(
            "POST",
            "/v1/responses",
            "Answer, and keep the answer",
            (
                Answer(JSON, Response, "The whole answer.", _RESPONSE),
                Answer(
                    EVENTS,
                    ResponseEvent | OutputItemEvent | ContentPartEvent | OutputTextDelta | OutputTextDone,
                    "With `stream`: typed events around it.",
                    (
                        _DELTA,
                        {"type": "response.completed", "sequence_number": 9, "response": _RESPONSE},
                    ),
                    has_event_names=True,
                    failure=ResponseFailedEvent,
                ),
            ),
            body=ResponsesBody,
            examples={
                "A stream": {"input": "What is a motet?", "max_output_tokens": 64, "stream": True},
                "Messages and instructions": {
                    "model": "default",
                    "instructions": "Answer in one sentence.",
                    "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
                    "max_output_tokens": 32,
                },
            },
            parameters=(
                Parameter(
                    "stream",
                    "`true` asks for a stream where the body does not say.",
                    schema=Literal["true", "false"],
                ),
            ),
            refusals=(*GENERATING, PreviousResponseNotFound),
            is_generation=True,
        ),
        Operation(
            "GET",
            "/v1/responses/{id}",
            "Read a kept response",
            json_answer(Response, "As it was answered.", _RESPONSE),
            parameters=(
                _ID,
                Parameter("stream", "Refused if true: the response has ended.", schema=Literal["false"]),
            ),
            refusals=(BadRequest, ResponseNotFound),
        ),
        Operation(
            "DELETE",
            "/v1/responses/{id}",
            "Delete a kept response",
            json_answer(
                DeletedResponse, "It is gone.", {"id": "resp_1", "object": "response", "deleted": True}
            ),
            parameters=(_ID,),
            refusals=(ResponseNotFound,),
        ),
        Operation(
            "GET",
            "/v1/responses/{id}/input_items",
            "List what went into a kept response",
            json_answer(InputItemList, "A page of the conversation."),
            parameters=(
                _ID,
                Parameter("order", "Oldest or newest first.", schema=Literal["asc", "desc"]),
                Parameter("limit", "Items, 1 to 100; default 20.", schema=int),
                Parameter("after", "The id of the item before the first one."),
            ),
            refusals=(BadRequest, ResponseNotFound),
        ),
        Operation(
            "POST",
            "/v1/responses/{id}/cancel",
            "Cancel a response",
            (),
            about="Always refused: every response belongs to a request that waits for it. To stop it, close "
            "the request.",
            parameters=(_ID,),
            refusals=(BadRequest, ResponseNotFound),
        ),
    ),
    neutral={ResponsesBody: {**NEUTRAL, "reasoning": REASONING_NEUTRAL, "text": TEXT_NEUTRAL}},
    notes={
        ResponsesBody: {
            **ADAPTER_NOTES,
            "model": "An adapter, or a name of the base model; null is the base model.",
            "input": "A text, or messages.",
            "previous_response_id": "Go on from a kept response.",
            "store": "False: do not keep the response.",
        },
        StreamOptions: {"include_obfuscation": "Pad the deltas, so that their sizes say less."},
    },
)
