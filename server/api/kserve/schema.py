"""Bodies of the KServe v2 routes, and the parameters of Triton's generate extension.

Parameters have the names of Triton's two backends for language models, vLLM's and TensorRT-LLM's; where these
differ, either name is taken, the first one listed here before the other.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from server.api.adapter_fields import AdapterFields
from server.api.schema import MAX_INT, MAX_SEED, Body

MAX_TENSORS = 256
MAX_RANK = 8

Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
    "STRING",  # how Inferless writes BYTES
]


class TensorBody(Body):
    """One tensor of a request."""

    name: Annotated[str, Field(min_length=1)]
    datatype: Datatype
    shape: Annotated[list[Annotated[int, Field(ge=0, le=MAX_INT)]], Field(max_length=MAX_RANK)]
    data: list[object]


class OutputBody(Body):
    """One tensor that a request asks for."""

    name: str


class InferBody(Body):
    """`POST /v2/models/{id}/infer`"""

    id: str | None = None
    inputs: Annotated[list[TensorBody], Field(max_length=MAX_TENSORS)]
    outputs: Annotated[list[OutputBody], Field(max_length=MAX_TENSORS)] | None = None
    parameters: dict[str, object] | None = None


class GenerateBody(Body):
    """`POST /v2/models/{id}/generate`, `/generate_stream`: all other keys are inputs or parameters, too."""

    id: str | None = None
    parameters: dict[str, object] | None = None


class RepositoryBody(Body):
    """`POST /v2/repository/models/{id}/load`, `/unload`"""

    parameters: dict[str, object] | None = None


class IndexBody(Body):
    """`POST /v2/repository/index`"""

    ready: bool | None = None


class GenerateParameters(AdapterFields):
    """What a request for our own models may ask for, from wherever in the body it came."""

    adapter: str | None = Field(
        None, validation_alias=AliasChoices("lora_name", "adapter_id", "adapter_name", "lora_id")
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = Field(
        None, validation_alias=AliasChoices("max_tokens", "max_new_tokens", "request_output_len")
    )
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = Field(
        None, validation_alias=AliasChoices("min_tokens", "min_length")
    )
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, validation_alias=AliasChoices("top_p", "runtime_top_p")
    )
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = Field(
        None, validation_alias=AliasChoices("top_k", "runtime_top_k")
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, validation_alias=AliasChoices("seed", "random_seed")
    )
    stop: object = Field(None, validation_alias=AliasChoices("stop", "stop_words"))
    stop_token_ids: Annotated[list[int], Field(max_length=128)] | None = None
    end_id: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    exclude_input_in_output: bool | None = None
    return_finish_reason: bool | None = None
    return_num_input_tokens: bool | None = None
    return_num_output_tokens: bool | None = None


_NO_WORDS: tuple[object, ...] = ("", [], [""])

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "bad_words": _NO_WORDS,
    "beam_width": (1,),
    "best_of": (1,),
    "draft_input_ids": (),
    "early_stopping": (False,),
    "embedding_bias_weights": ([],),
    "embedding_bias_words": _NO_WORDS,
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "image": ([],),
    "length_penalty": (0, 0.0, 1, 1.0),
    "len_penalty": (0, 0.0, 1, 1.0),
    "logit_bias": ({},),
    "logprobs": (),
    "lora_config": (),
    "lora_task_id": (),
    "lora_weights": (),
    "n": (1,),
    "num_return_sequences": (1,),
    "prompt_embedding_table": (),
    "prompt_logprobs": (),
    "return_context_logits": (False,),
    "return_cumulative_logprob": (False,),
    "return_generation_logits": (False,),
    "return_log_probs": (False,),
    "return_logprobs": (False,),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "use_beam_search": (False,),
}
"""Known to Triton's backends, not served: the values that ask for nothing. Null always does."""
