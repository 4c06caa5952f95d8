"""What OpenAI's routes are documented as: the forms of their answers, examples, and the list of models."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict

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
from server.api.openai.embeddings_schema import NEUTRAL as EMBEDDINGS_NEUTRAL
from server.api.openai.embeddings_schema import EmbeddingsBody
from server.api.openai.schema import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    ChatBody,
    CompletionBody,
    Message,
    StreamOptions,
)
from server.errors import ModelNotFound, Unavailable

FinishWord = Literal["stop", "length"]


class CachedTokens(TypedDict):
    cached_tokens: int


class CompletionUsage(TypedDict):
    """The prompt is counted once, the tokens of all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class FinishDetails(TypedDict):
    """How a choice ended and what it cost."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    seed: int | None
    queue_time_ms: float
    time_to_first_token_ms: float
    total_time_ms: float


class SpelledToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(SpelledToken):
    top_logprobs: list[SpelledToken]


class ChatLogprobs(TypedDict):
    content: list[ChatToken]


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishWord
    stop_reason: str | int | None


class Envelope(TypedDict):
    """What all objects of one answer say alike."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    service_tier: NotRequired[str]


class PromptToken(TypedDict):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]


class ChatCompletion(Envelope):
    """The answer to a chat, whole."""

    prompt_logprobs: NotRequired[PromptLogprobs]

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChatDelta(TypedDict):
    """The role is in a choice's first chunk only, together with its first text."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: NotRequired[ChatLogprobs]
    finish_reason: FinishWord | None
    stop_reason: NotRequired[str | int | None]


class FinalMembers(TypedDict):
    """What the chunk that ends a choice says on top."""

    usage: NotRequired[CompletionUsage | None]
    generated_text: NotRequired[str]
    details: NotRequired[FinishDetails]
    obfuscation: NotRequired[str]


class ChatCompletionChunk(Envelope, FinalMembers):
    """One frame of a chat stream. The chunk that ends a choice carries its whole text and `details`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class CompletionLogprobs(TypedDict):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishWord
    stop_reason: str | int | None
    prompt_logprobs: NotRequired[PromptLogprobs]


class Completion(Envelope):
    """The continuation of a text, whole."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: CompletionUsage


class CompletionChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: NotRequired[CompletionLogprobs]
    finish_reason: FinishWord | None
    stop_reason: NotRequired[str | int | None]


class CompletionChunk(Envelope, FinalMembers):
    """One frame of a completion stream. The chunk that ends a choice carries its whole text and `details`."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


class Embedding(TypedDict):
    """Numbers, or a base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    """One vector of length 1 for each input."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(TypedDict):
    """The base model or an adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[dict[str, object]]
    revision: NotRequired[str | None]


class ModelList(TypedDict):
    """The base first, then the adapters by name."""

    object: Literal["list"]
    data: list[Model]


_HELLO = [{"role": "user", "content": "What is a motet?"}]
_ENVELOPE = {"id": "chatcmpl-1", "created": 1764000000, "model": "motet", "system_fingerprint": "fp_1"}
_USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 2,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 0},
}
_DETAILS = {
    "finish_reason": "length",
    "prompt_tokens": 12,
    "generated_tokens": 2,
    "cached_tokens": 0,
    "seed": None,
    "queue_time_ms": 0.2,
    "time_to_first_token_ms": 31.5,
    "total_time_ms": 52.9,
}
_END = {"finish_reason": "length", "stop_reason": None}
_FINAL = {"generated_text": "Several voices", "details": _DETAILS}
_MODEL = {
    "id": "motet",
    "object": "model",
    "created": 1764000000,
    "owned_by": "motet",
    "root": "motet",
    "parent": None,
    "max_model_len": 2048,
    "permission": [],
}


def _chunk(kind: str, choice: dict[str, object], **more: object) -> dict[str, object]:
    return {**_ENVELOPE, "object": kind, "choices": [{"index": 0, **choice}], **more}


_CHAT_CHUNK, _TEXT_CHUNK = "chat.completion.chunk", "text_completion"

_CHAT_ANSWERS = (
    Answer(
        JSON,
        ChatCompletion,
        "The whole answer.",
        _chunk(
            "chat.completion",
            {"message": {"role": "assistant", "content": "Several voices"}, "logprobs": None, **_END},
            usage=_USAGE,
        ),
    ),
    Answer(
        EVENTS,
        ChatCompletionChunk,
        "With `stream`: one event per piece of text.",
        (
            _chunk(
                _CHAT_CHUNK, {"delta": {"role": "assistant", "content": "Several"}, "finish_reason": None}
            ),
            _chunk(_CHAT_CHUNK, {"delta": {"content": " voices"}, "finish_reason": None}),
            _chunk(_CHAT_CHUNK, {"delta": {}, **_END}, **_FINAL),
        ),
        end="[DONE]",
    ),
)

_COMPLETION_ANSWERS = (
    Answer(
        JSON,
        Completion,
        "The whole answer.",
        _chunk("text_completion", {"text": "Several voices", "logprobs": None, **_END}, usage=_USAGE),
    ),
    Answer(
        EVENTS,
        CompletionChunk,
        "With `stream`: one event per piece of text.",
        (
            _chunk(_TEXT_CHUNK, {"text": "Several", "finish_reason": None}),
            _chunk(_TEXT_CHUNK, {"text": " voices", "finish_reason": None}),
            _chunk(_TEXT_CHUNK, {"text": "", **_END}, **_FINAL),
        ),
        end="[DONE]",
    ),
)

_STREAM_IN_QUERY = Parameter(
    "stream", "`true` or `1` asks for a stream where the body does not say.", schema=Literal["true", "false"]
)

_NOTES = {
    "model": "An adapter, or a name of the base model; null is the base model.",
    "lora_id": "Another way to name the adapter; `model` may then name the same one, or the base.",
    "n": "How many choices.",
    "stop": "The answer ends before the first of these.",
    "stop_token_ids": "The answer ends with the first of these tokens.",
    "temperature": "0 is greedy.",
    "top_k": "0 and -1 switch it off.",
    "seed": "Equal seeds give equal answers, whatever else runs.",
}

CHAPTER = Chapter(
    tag="OpenAI",
    about="OpenAI's routes. An adapter is chosen by `model`; without it, the base model answers.",
    operations=(
        Operation(
            "POST",
            "/v1/chat/completions",
            "Answer a chat",
            _CHAT_ANSWERS,
            body=ChatBody,
            examples={
                "A stream": {"messages": _HELLO, "max_tokens": 64, "stream": True},
                "Whole, greedy": {"model": "default", "messages": _HELLO, "temperature": 0, "max_tokens": 32},
                "Log-probabilities and usage": {
                    "messages": _HELLO,
                    "max_tokens": 16,
                    "logprobs": True,
                    "top_logprobs": 2,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
            },
            parameters=(_STREAM_IN_QUERY,),
            refusals=GENERATING,
            is_generation=True,
        ),
        Operation(
            "POST",
            "/v1/completions",
            "Continue a text",
            _COMPLETION_ANSWERS,
            body=CompletionBody,
            examples={
                "A stream": {"prompt": "A motet is", "max_tokens": 32, "stream": True},
                "Whole, with log-probabilities": {"prompt": "A motet is", "max_tokens": 8, "logprobs": 2},
                "Two prompts, echoed": {
                    "prompt": ["A motet", "A fugue"],
                    "max_tokens": 4,
                    "echo": True,
                    "logprobs": 1,
                },
                "Two choices": {"prompt": "A motet is", "max_tokens": 8, "n": 2, "seed": 1},
            },
            parameters=(_STREAM_IN_QUERY,),
            refusals=GENERATING,
            is_generation=True,
        ),
        Operation(
            "POST",
            "/v1/embeddings",
            "Embed texts",
            json_answer(EmbeddingList, "The vectors."),
            body=EmbeddingsBody,
            examples={
                "Two texts": {"input": ["A motet", "A fugue"]},
                "Last token, as base64": {"input": "A motet", "pooling": "last", "encoding_format": "base64"},
            },
            refusals=GENERATING,
            is_generation=True,
        ),
        Operation(
            "GET",
            "/v1/models",
            "List the models",
            json_answer(ModelList, "Those that the key may use.", {"object": "list", "data": [_MODEL]}),
            refusals=(Unavailable,),
        ),
        Operation(
            "GET",
            "/v1/models/{id:path}",
            "Show a model",
            json_answer(Model, "The model.", _MODEL),
            parameters=(
                Parameter(
                    "id",
                    "Any name of the model; slashes as they are or as `%2F`.",
                    where="path",
                    example="default",
                ),
            ),
            refusals=(ModelNotFound, Unavailable),
        ),
    ),
    neutral={ChatBody: CHAT_NEUTRAL, CompletionBody: COMPLETION_NEUTRAL, EmbeddingsBody: EMBEDDINGS_NEUTRAL},
    notes={
        ChatBody: {
            **_NOTES,
            "top_logprobs": "Needs `logprobs`.",
            "continue_final_message": "Needs `add_generation_prompt: false`.",
        },
        CompletionBody: {
            **_NOTES,
            "prompt": "A text, token ids, or a list of these.",
            "echo": "The text begins with the prompt.",
            "logprobs": "How many alternatives to each token.",
        },
        EmbeddingsBody: {
            "truncate_prompt_tokens": "Keep the first ones of an input; -1: what the context holds."
        },
        StreamOptions: {
            "chunk_by": "Where the text is cut into events.",
            "chunk_size": "How many of these to one event.",
            "continuous_usage_stats": "Usage in every chunk.",
        },
        Message: {"content": "A text, or parts of type `text`; other parts are refused by name."},
    },
)
