"""What the routes of KServe v2 are documented as: the forms of their answers, and examples.

Inferless apps answer on the same routes with names of their own, which no schema can list.
"""

from typing import Literal, NotRequired

from pydantic import BaseModel
from typing_extensions import TypedDict

from server.api.adapter_fields import ADAPTER_NOTES
from server.api.docs.operations import (
    ADMINISTERING,
    EVENTS,
    GENERATING,
    JSON,
    READING,
    Answer,
    Chapter,
    Operation,
    Parameter,
    json_answer,
)
from server.api.kserve.schema import (
    NEUTRAL,
    GenerateParameters,
    IndexBody,
    InferBody,
    RepositoryBody,
)
from server.api.openai.chapter import FinishDetails
from server.api.schema import Body
from server.errors import ModelNotFound, Unavailable, UnsupportedMediaType


class GenerateRequest(Body):
    """What a model of ours takes; each parameter may also stand beside `text_input`, or be a tensor in
    `inputs`.
    """

    id: str | None = None
    text_input: str
    parameters: GenerateParameters | None = None


class GenerateFrame(TypedDict):
    """One piece of text."""

    id: NotRequired[str]
    model_name: str
    model_version: str
    text_output: str
    finish_reason: NotRequired[Literal["None", "length", "stop"]]
    num_input_tokens: NotRequired[int]
    num_output_tokens: NotRequired[int]
    generated_text: NotRequired[str]
    details: NotRequired[FinishDetails]


class GenerateAnswer(TypedDict):
    """The whole answer."""

    id: NotRequired[str]
    model_name: str
    model_version: str
    text_output: str
    generated_text: str
    details: FinishDetails
    finish_reason: NotRequired[Literal["length", "stop"]]
    num_input_tokens: NotRequired[int]
    num_output_tokens: NotRequired[int]


class OutputTensor(TypedDict):
    """One output, its elements in row-major order."""

    name: str
    datatype: str
    shape: list[int]
    data: list[object]


class InferAnswer(TypedDict):
    """A tensor for each output."""

    id: NotRequired[str]
    model_name: str
    model_version: str
    outputs: list[OutputTensor]


class ServerMetadata(TypedDict):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(TypedDict):
    """-1 stands for any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    """What a model takes and answers; the outputs of an Inferless app are not known beforehand."""

    name: str
    versions: list[str]
    platform: Literal["motet", "inferless"]
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerLive(TypedDict):
    live: bool


class ServerReady(TypedDict):
    ready: bool


class ModelReady(TypedDict):
    name: str
    ready: bool


class IndexEntry(TypedDict):
    """One model. `reason` says why it is not ready."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class Nothing(TypedDict):
    """It is done."""


_DETAILS = {
    "finish_reason": "length",
    "prompt_tokens": 4,
    "generated_tokens": 2,
    "cached_tokens": 0,
    "seed": None,
    "queue_time_ms": 0.2,
    "time_to_first_token_ms": 31.5,
    "total_time_ms": 52.9,
}
_SAID = {"model_name": "motet", "model_version": "1"}
_END = {"generated_text": " several voices", "details": _DETAILS}
_VERSION = Parameter("version", "There is only this one.", where="path", example="1")
_REFUSALS = (*GENERATING, UnsupportedMediaType)
_ADMIN_REFUSALS = (*ADMINISTERING, UnsupportedMediaType)
_ADMIN = (
    "Asks for the key of an admin. On a server without keys it is closed to web pages from elsewhere. May be "
    "repeated: what is already so is 200."
)
_GENERATE_EXAMPLES: dict[str, dict[str, object]] = {
    "A prompt": {"text_input": "A motet is", "parameters": {"max_tokens": 16, "temperature": 0.0}},
    "Counted": {
        "id": "7",
        "text_input": "A motet is",
        "parameters": {
            "max_tokens": 16,
            "stop": ["."],
            "return_finish_reason": True,
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
        },
    },
}
_INFER_EXAMPLES: dict[str, dict[str, object]] = {
    "A prompt": {
        "inputs": [
            {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["A motet is"]},
            {"name": "max_tokens", "datatype": "INT32", "shape": [1], "data": [16]},
        ]
    }
}


def _of_model(
    method: Literal["GET", "POST"],
    end: str,
    summary: str,
    answers: tuple[Answer, ...],
    *,
    body: type[BaseModel] | None = None,
    examples: dict[str, dict[str, object]] | None = None,
) -> tuple[Operation, ...]:
    """An operation on a model, which may be written with a version."""

    def at(path: str, *parameters: Parameter) -> Operation:
        return Operation(
            method,
            f"{path}{end}",
            summary,
            answers,
            body=body,
            examples=examples or {},
            parameters=parameters,
            refusals=_REFUSALS if method == "POST" else (ModelNotFound, Unavailable),
            is_generation=method == "POST",
        )

    return (at("/v2/models/{id:path}"), at("/v2/models/{id:path}/versions/{version}", _VERSION))


CHAPTER = Chapter(
    tag="KServe and Triton",
    about="The open inference protocol (KServe v2) and Triton's generate extension. The model in the path is "
    "the base, an adapter, or an Inferless app; ids may hold slashes. An app takes the inputs of its own "
    "schema, in the same forms, and answers with outputs of its own.",
    operations=(
        *_of_model(
            "POST",
            "/generate",
            "Generate",
            json_answer(
                GenerateAnswer, "The whole answer.", {**_SAID, "text_output": " several voices", **_END}
            ),
            body=GenerateRequest,
            examples=_GENERATE_EXAMPLES,
        ),
        *_of_model(
            "POST",
            "/generate_stream",
            "Generate, piece by piece",
            (
                Answer(
                    EVENTS,
                    GenerateFrame,
                    "One event per piece of text; the last one carries the whole text and `details`.",
                    ({**_SAID, "text_output": " several"}, {**_SAID, "text_output": " voices", **_END}),
                ),
            ),
            body=GenerateRequest,
            examples=_GENERATE_EXAMPLES,
        ),
        *_of_model(
            "POST",
            "/infer",
            "Generate, in tensors",
            json_answer(
                InferAnswer,
                "Tensors in the shape of `text_input`.",
                {
                    **_SAID,
                    "outputs": [
                        {
                            "name": "text_output",
                            "datatype": "BYTES",
                            "shape": [1],
                            "data": [" several voices"],
                        }
                    ],
                },
            ),
            body=InferBody,
            examples=_INFER_EXAMPLES,
        ),
        *_of_model("GET", "", "Describe a model", json_answer(ModelMetadata, "What it takes and answers.")),
        *_of_model(
            "GET",
            "/ready",
            "Does a model take requests?",
            json_answer(ModelReady, "Yes.", {"name": "motet", "ready": True}),
        ),
        Operation(
            "GET",
            "/v2",
            "Describe the server",
            json_answer(ServerMetadata, "Its name, version and extensions."),
        ),
        Operation(
            "GET",
            "/v2/health/live",
            "Is the process worth keeping?",
            json_answer(ServerLive, "It is, while `live` is true.", {"live": True}),
            is_open=True,
        ),
        Operation(
            "GET",
            "/v2/health/ready",
            "Does every model take requests?",
            (
                Answer(JSON, ServerReady, "Yes.", {"ready": True}),
                Answer(JSON, ServerReady, "Not now.", {"ready": False}, status=503),
            ),
            about="Inferless apps count, but for those that were unloaded.",
            is_open=True,
        ),
        Operation(
            "POST",
            "/v2/repository/index",
            "List the models",
            json_answer(
                list[IndexEntry],
                "The base, the adapters, the apps.",
                [{"name": "motet", "version": "1", "state": "READY", "reason": ""}],
            ),
            body=IndexBody,
            is_body_required=False,
            examples={"Those that are ready": {"ready": True}},
            refusals=(*READING, UnsupportedMediaType, Unavailable),
        ),
        Operation(
            "POST",
            "/v2/repository/models/{id:path}/load",
            "Load an adapter, or start an app",
            json_answer(Nothing, "It is there, or the app is starting.", {}),
            about=_ADMIN,
            body=RepositoryBody,
            is_body_required=False,
            examples={"From the adapters folder": {"parameters": {"lora_path": "/adapters/pirate"}}},
            parameters=(Parameter("id", "Its name.", where="path", example="pirate"),),
            refusals=_ADMIN_REFUSALS,
        ),
        Operation(
            "POST",
            "/v2/repository/models/{id:path}/unload",
            "Unload an adapter, or stop an app",
            json_answer(Nothing, "It is gone.", {}),
            about=_ADMIN,
            body=RepositoryBody,
            is_body_required=False,
            examples={"By name": {"parameters": {}}},
            parameters=(Parameter("id", "Its name.", where="path", example="pirate"),),
            refusals=_ADMIN_REFUSALS,
        ),
    ),
    neutral={GenerateParameters: NEUTRAL},
    notes={
        GenerateParameters: {
            **ADAPTER_NOTES,
            "lora_name": "The adapter, where the path names the base model.",
            "max_tokens": "Default: 16.",
            "stop": "Up to 16 strings; the text ends before the first of them.",
            "end_id": "A token that ends the answer, too.",
            "top_p": "0 switches it off.",
            "exclude_input_in_output": "False: the text begins with the prompt; not in a stream.",
        },
        RepositoryBody: {"parameters": "`lora_path`: a folder below `--adapters-dir`."},
    },
)
