"""What the routes of LoRAX and TGI are documented as: the forms of their answers, and examples."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from server.api.adapter_fields import ADAPTER_NOTES, TWO_AT_ONCE, MergedAdapters
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
from server.api.openai.chapter import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    FinishDetails,
)
from server.api.openai.schema import ChatBody, CompletionBody
from server.api.shapes import LORAX, OPENAI
from server.api.tgi.schema import NEUTRAL, DetokenizeBody, GenerateBody, Parameters, TokenizeBody
from server.errors import ContextTooLong, TemplateFailed, Unavailable, UnsupportedMediaType


class AlternativeToken(TypedDict):
    id: int
    text: str
    logprob: float


class LoraxToken(TypedDict):
    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool
    alternative_tokens: NotRequired[list[AlternativeToken]]


class TopToken(TypedDict):
    id: int
    text: str
    logprob: float
    special: bool


class PrefillToken(TypedDict):
    id: int
    text: str
    logprob: float | None


class LoraxLists(TypedDict):
    """With `details`: the tokens."""

    prefill: list[PrefillToken]
    tokens: list[LoraxToken]
    top_tokens: NotRequired[list[list[TopToken]]]


class LoraxSequence(LoraxLists):
    """With `best_of`: one that was not the best."""

    generated_text: str
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None


class LoraxStreamDetails(FinishDetails):
    """How a generation ended."""

    skipped_tokens: int
    input_length: int


class LoraxDetails(LoraxStreamDetails, LoraxLists):
    """How a generation ended, and with `details` its tokens."""

    best_of_sequences: NotRequired[list[LoraxSequence]]


class LoraxGeneration(TypedDict):
    """The whole answer."""

    generated_text: str
    details: LoraxDetails


class LoraxStreamFrame(TypedDict):
    """One token. The last one's frame carries the whole text and `details`; nothing follows it."""

    index: int
    token: LoraxToken
    top_tokens: NotRequired[list[TopToken]]
    generated_text: str | None
    details: LoraxStreamDetails | None


class TextSpan(TypedDict):
    """A token and the characters that it stands for: [start, stop)."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokens(TypedDict):
    """The tokens of a chat, and the text that its template makes of it."""

    tokenize_response: list[TextSpan]
    templated_text: str


class Detokenized(TypedDict):
    prompt: str


class Started(TypedDict):
    status: Literal["ok"]


class NotStarted(TypedDict):
    error: str
    error_type: str


class LoraxInfo(TypedDict):
    """LoRAX's fields, and TGI's where they are called otherwise."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int | None
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float | None
    max_batch_total_tokens: int | None
    max_waiting_tokens: int | None
    validation_workers: int
    eager_prefill: bool
    version: str
    sha: str | None
    docker_label: str | None
    request_logger_url: str | None
    max_input_tokens: int
    max_client_batch_size: int
    router: str


_DETAILS = {
    "finish_reason": "length",
    "prompt_tokens": 4,
    "generated_tokens": 2,
    "cached_tokens": 0,
    "seed": None,
    "queue_time_ms": 0.2,
    "time_to_first_token_ms": 31.5,
    "total_time_ms": 52.9,
    "skipped_tokens": 0,
    "input_length": 4,
}
_ONE = {"id": 312, "text": " several", "logprob": -0.71, "special": False, "skipped": False}
_TWO = {"id": 977, "text": " voices", "logprob": -0.12, "special": False, "skipped": False}
_GENERATION = {"generated_text": " several voices", "details": {**_DETAILS, "prefill": [], "tokens": []}}

_STREAM = Answer(
    EVENTS,
    LoraxStreamFrame,
    "One event per token.",
    (
        {"index": 1, "token": _ONE, "generated_text": None, "details": None},
        {"index": 2, "token": _TWO, "generated_text": " several voices", "details": _DETAILS},
    ),
)
_REFUSALS = (*GENERATING, UnsupportedMediaType)
_EXAMPLES: dict[str, dict[str, object]] = {
    "Greedy": {"inputs": "A motet is", "parameters": {"max_new_tokens": 16}},
    "Sampled, with every token": {
        "inputs": "A motet is",
        "parameters": {"max_new_tokens": 16, "temperature": 0.7, "seed": 1, "details": True},
    },
    "The best of two": {
        "inputs": "A motet is",
        "parameters": {
            "max_new_tokens": 8,
            "do_sample": True,
            "best_of": 2,
            "details": True,
            "top_n_tokens": 2,
        },
    },
    "Two adapters at once": {
        "inputs": "A motet is",
        "parameters": {"max_new_tokens": 16, "lora": TWO_AT_ONCE},
    },
    "Two adapters, merged": {
        "inputs": "A motet is",
        "parameters": {
            "max_new_tokens": 16,
            "merged_adapters": {
                "ids": ["pirate", "haiku"],
                "weights": [1.0, 0.5],
                "merge_strategy": "ties",
                "density": 0.5,
            },
        },
    },
    "A chat, with alternatives": {
        "inputs": "What is a motet?",
        "parameters": {"apply_chat_template": True, "max_new_tokens": 16, "return_k_alternatives": 2},
    },
}

CHAPTER = Chapter(
    tag="LoRAX and TGI",
    about="The routes of LoRAX and of Text Generation Inference. An adapter is chosen by "
    "`parameters.adapter_id`, several at once by `lora` or `merged_adapters`; without any of these, the base "
    "model answers. Generation is greedy unless sampling is asked for.",
    operations=(
        Operation(
            "POST",
            "/generate",
            "Generate",
            json_answer(LoraxGeneration, "The whole answer.", _GENERATION),
            body=GenerateBody,
            examples=_EXAMPLES,
            refusals=_REFUSALS,
            is_generation=True,
        ),
        Operation(
            "POST",
            "/generate_stream",
            "Generate, token by token",
            (_STREAM,),
            body=GenerateBody,
            examples={name: body for name, body in _EXAMPLES.items() if "best" not in name},
            refusals=_REFUSALS,
            is_generation=True,
        ),
        Operation(
            "POST",
            "/",
            "Generate, streamed or not",
            (
                Answer(JSON, list[LoraxGeneration], "The whole answer, in a list of one.", [_GENERATION]),
                _STREAM,
            ),
            body=GenerateBody,
            examples={**_EXAMPLES, "A stream": {"inputs": "A motet is", "stream": True}},
            refusals=_REFUSALS,
            is_generation=True,
        ),
        Operation(
            "POST",
            "/invocations",
            "SageMaker's one route for everything",
            (
                Answer(
                    JSON,
                    list[LoraxGeneration] | ChatCompletion | Completion,
                    "As the route answers that such a body belongs to.",
                ),
                Answer(
                    EVENTS,
                    LoraxStreamFrame | ChatCompletionChunk | CompletionChunk,
                    "Streamed likewise; `[DONE]` at the end of chats and completions only.",
                    end="[DONE]",
                    is_end_certain=False,
                    shapes=(LORAX, OPENAI),
                ),
            ),
            about="`inputs` as on `/`, `messages` as a chat, `prompt` as a completion.",
            body=GenerateBody | ChatBody | CompletionBody,
            examples={
                "Inputs": {"inputs": "A motet is", "parameters": {"max_new_tokens": 16}},
                "A chat": {
                    "messages": [{"role": "user", "content": "What is a motet?"}],
                    "max_tokens": 16,
                    "stream": True,
                },
                "A text": {"prompt": "A motet is", "max_tokens": 16},
                "Inputs, streamed": {"inputs": "A motet is", "stream": True},
            },
            refusals=_REFUSALS,
            is_generation=True,
        ),
        Operation(
            "GET",
            "/startup",
            "Can a token be generated?",
            (
                Answer(JSON, Started, "Yes.", {"status": "ok"}),
                Answer(JSON, NotStarted, "No.", status=500),
            ),
            refusals=(Unavailable,),
        ),
        Operation(
            "POST",
            "/chat_tokenize",
            "Tokenise a chat",
            json_answer(ChatTokens, "The prompt of such a chat."),
            body=ChatBody,
            examples={"A chat": {"messages": [{"role": "user", "content": "What is a motet?"}]}},
            refusals=(*READING, ContextTooLong, TemplateFailed, UnsupportedMediaType, Unavailable),
        ),
        Operation(
            "POST",
            "/detokenize",
            "Token ids to text",
            json_answer(Detokenized, "The text, special tokens spelled out."),
            body=DetokenizeBody,
            examples={"Three tokens": {"tokens": [72, 105, 33]}},
            refusals=(*READING, ContextTooLong, UnsupportedMediaType, Unavailable),
        ),
        Operation(
            "GET",
            "/info",
            "Describe the server",
            json_answer(LoraxInfo, "What is served, and its limits."),
            refusals=(Unavailable,),
        ),
        Operation(
            "POST",
            "/tokenize",
            "Tokenise a text",
            json_answer(list[TextSpan], "The tokens.", [{"id": 5, "text": "Mo", "start": 0, "stop": 2}]),
            body=TokenizeBody,
            examples={"A text": {"inputs": "A motet is", "add_special_tokens": False}},
            refusals=(*READING, ContextTooLong, UnsupportedMediaType, Unavailable),
        ),
    ),
    neutral={Parameters: NEUTRAL},
    notes={
        Parameters: {
            **ADAPTER_NOTES,
            "adapter_id": "The adapter; null, and any name of the base model, is the base model.",
            "do_sample": "Sample; so do a temperature other than 0 and 1, top_k, and a top_p below 1.",
            "details": "List the tokens.",
            "return_full_text": "The text begins with the prompt.",
            "return_k_alternatives": "How many alternatives to each token, up to 20.",
            "stop": "Up to 16 strings; the text ends after the first of them.",
            "truncate": "Keep only this many tokens of the prompt, the last ones.",
            "max_new_tokens": "Default: what the context leaves.",
            "merged_adapters": "Adapters whose weights are merged into one, in place of `adapter_id`; once, "
            "and then it is kept. At each layer the ranks must agree.",
        },
        MergedAdapters: {
            "weights": "One for each id, from -100 to 100; null: 1 each.",
            "merge_strategy": "`linear` (default), `ties`, `dare_linear` or `dare_ties`, as PEFT has them.",
            "density": "Share of the numbers that is kept, above 0 and up to 1; all but `linear` need it.",
            "majority_sign_method": "`total` (default) or `frequency`; for `ties` and `dare_ties`.",
        },
    },
)
