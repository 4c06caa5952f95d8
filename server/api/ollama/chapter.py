"""What Ollama's routes are documented as."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from server.api.adapter_fields import ADAPTER_NOTES
from server.api.docs.operations import (
    GENERATING,
    JSON,
    LINES,
    READING,
    Answer,
    Chapter,
    Operation,
    json_answer,
)
from server.api.ollama.schema import (
    CHAT_NEUTRAL,
    GENERATE_NEUTRAL,
    OPTIONS_NEUTRAL,
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    NamedBody,
    Options,
)
from server.api.openai.chapter import FinishDetails, SpelledToken
from server.errors import BadRequest, ModelNotFound, Unavailable, UnsupportedMediaType


class OllamaToken(SpelledToken):
    top_logprobs: NotRequired[list[SpelledToken]]


class OllamaLine(TypedDict):
    """What every line says, and a whole answer too."""

    model: str
    created_at: str
    done: bool
    logprobs: NotRequired[list[OllamaToken]]


class OllamaEnd(TypedDict):
    """What the end of an answer says on top; durations are nanoseconds."""

    done_reason: NotRequired[Literal["stop", "length", "load", "unload"]]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]
    generated_text: NotRequired[str]
    details: NotRequired[FinishDetails]


class OllamaGeneration(OllamaLine, OllamaEnd):
    """A whole answer, or one line of a stream, of which the last says what it cost."""

    response: str
    context: NotRequired[list[int]]


class OllamaMessage(TypedDict):
    role: Literal["assistant"]
    content: str


class OllamaChat(OllamaLine, OllamaEnd):
    """A whole answer, or one line of a stream, of which the last says what it cost."""

    message: OllamaMessage


class OllamaEmbeddings(TypedDict):
    """One vector of length 1 for each text."""

    model: str
    embeddings: list[list[float]]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]


class OllamaEmbedding(TypedDict):
    embedding: list[float]


class OllamaModelDetails(TypedDict):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModelName(TypedDict):
    name: str
    model: str
    size: int
    digest: str
    details: OllamaModelDetails


class OllamaModel(OllamaModelName):
    """The base model, or an adapter with its `details.parent_model`."""

    modified_at: str
    capabilities: list[str]


class OllamaModelList(TypedDict):
    models: list[OllamaModel]


class OllamaProcess(OllamaModelName):
    """A model in memory."""

    expires_at: str
    size_vram: int
    context_length: int


class OllamaProcessList(TypedDict):
    models: list[OllamaProcess]


class OllamaDescription(TypedDict):
    modelfile: str
    parameters: str
    template: str
    details: OllamaModelDetails
    model_info: dict[str, object]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(TypedDict):
    """The release of Ollama whose routes these are, and this server's own version."""

    version: str
    motet: str


class OllamaStatus(TypedDict):
    status: str


_HELLO = [{"role": "user", "content": "What is a motet?"}]
_LINE = {"model": "motet", "created_at": "2025-11-24T16:00:00.000000000Z"}
_END = {
    "done": True,
    "done_reason": "length",
    "total_duration": 52900000,
    "load_duration": 200000,
    "prompt_eval_count": 12,
    "prompt_eval_duration": 31300000,
    "eval_count": 2,
    "eval_duration": 21400000,
}
_REFUSALS = (*GENERATING, UnsupportedMediaType)
_NAMING = (*READING, ModelNotFound, UnsupportedMediaType, Unavailable)


def _generation(path: str, summary: str, schema: object, said: tuple[dict[str, object], ...]) -> Operation:
    """A route that streams unless it is told not to; `said`: a piece, the last one, and both as a whole."""
    piece, last, whole = said
    is_chat = path.endswith("chat")
    asked = {"messages": _HELLO} if is_chat else {"prompt": "What is a motet?"}
    return Operation(
        "POST",
        path,
        summary,
        (
            Answer(
                LINES,
                schema,
                "A stream of lines, unless the body says `stream: false`.",
                ({**_LINE, **piece, "done": False}, {**_LINE, **last, **_END}),
            ),
            Answer(JSON, schema, "The whole answer.", {**_LINE, **whole, **_END}),
        ),
        body=ChatBody if is_chat else GenerateBody,
        examples={
            "A stream": {"model": "default", **asked, "options": {"num_predict": 64}},
            "Whole, greedy": {
                "model": "default",
                **asked,
                "stream": False,
                "options": {"temperature": 0, "num_predict": 32},
            },
            "Log-probabilities": {
                "model": "default",
                **asked,
                "logprobs": True,
                "top_logprobs": 2,
                "options": {"num_predict": 8},
            },
            "Only load": {"model": "default"},
        },
        refusals=_REFUSALS,
        is_generation=True,
    )


def _message(text: str) -> dict[str, object]:
    return {"message": {"role": "assistant", "content": text}}


def _refused(method: Literal["POST", "DELETE"], path: str, summary: str) -> Operation:
    return Operation(
        method, path, summary, (), about="Always refused: this is done elsewhere.", refusals=(BadRequest,)
    )


CHAPTER = Chapter(
    tag="Ollama",
    about="Ollama's routes. Adapters are models of their own, by their bare names or with `:latest`.",
    operations=(
        _generation(
            "/api/generate",
            "Answer a prompt",
            OllamaGeneration,
            ({"response": "Several"}, {"response": ""}, {"response": "Several voices"}),
        ),
        _generation(
            "/api/chat",
            "Answer a chat",
            OllamaChat,
            (_message("Several"), _message(""), _message("Several voices")),
        ),
        Operation(
            "POST",
            "/api/embed",
            "Embed texts",
            json_answer(OllamaEmbeddings, "The vectors."),
            body=EmbedBody,
            examples={"Two texts": {"model": "default", "input": ["A motet", "A fugue"]}},
            refusals=_REFUSALS,
            is_generation=True,
        ),
        Operation(
            "POST",
            "/api/embeddings",
            "Embed one text, as older clients do",
            json_answer(OllamaEmbedding, "The vector."),
            body=EmbeddingsBody,
            examples={"A text": {"model": "default", "prompt": "A motet"}},
            refusals=_REFUSALS,
            is_generation=True,
        ),
        Operation(
            "GET",
            "/api/tags",
            "List the models",
            json_answer(OllamaModelList, "Those that the key may use."),
            refusals=(Unavailable,),
        ),
        Operation(
            "GET",
            "/api/ps",
            "List the models in memory",
            json_answer(OllamaProcessList, "Those of them that the key may use."),
            refusals=(Unavailable,),
        ),
        Operation(
            "POST",
            "/api/show",
            "Describe a model",
            json_answer(OllamaDescription, "The model."),
            body=NamedBody,
            examples={"The base model": {"model": "default"}},
            refusals=_NAMING,
        ),
        Operation(
            "GET",
            "/api/version",
            "The version that is spoken",
            json_answer(
                OllamaVersion, "Ollama's, and this server's.", {"version": "0.33.0", "motet": "0.1.0"}
            ),
        ),
        Operation(
            "POST",
            "/api/pull",
            "Make sure that a model is here",
            (
                Answer(LINES, OllamaStatus, "It is.", ({"status": "success"},)),
                Answer(JSON, OllamaStatus, "With `stream: false`: it is.", {"status": "success"}),
            ),
            about="Nothing is downloaded: an adapter has to be in the folder of adapters.",
            body=NamedBody,
            examples={
                "A stream": {"model": "default"},
                "Whole": {"model": "default", "stream": False},
            },
            refusals=_NAMING,
        ),
        _refused("POST", "/api/push", "Upload a model"),
        _refused("POST", "/api/create", "Make a model"),
        _refused("POST", "/api/copy", "Copy a model"),
        _refused("DELETE", "/api/delete", "Delete a model"),
    ),
    neutral={ChatBody: CHAT_NEUTRAL, GenerateBody: GENERATE_NEUTRAL, Options: OPTIONS_NEUTRAL},
    notes={
        GenerateBody: {"raw": "The prompt goes into the model as it is.", "context": "Of the last answer."},
        Options: {
            "lora": ADAPTER_NOTES["lora"],
            "num_predict": "Tokens of the answer; 0 and below: until the context is full.",
            "num_ctx": "Tokens of prompt and answer together.",
            "repeat_last_n": "Tokens that the penalties look back at; -1: all.",
        },
    },
)
