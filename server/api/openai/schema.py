"""Bodies of the OpenAI routes: OpenAI's fields, and those of vLLM that other programs have come to send."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.api.schema import MAX_INT, MAX_SEED, MIN_SEED, Body, StopStrings

MAX_MESSAGES = 16 * 1024  # all are validated in one go, which lets no other thread run

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


_TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": {"type": "string"}},
}

Content = Annotated[
    object,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"anyOf": [{"type": "string"}, _TEXT_PART]}},
                {"type": "null"},
            ]
        }
    ),
]

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}

Prompts = Annotated[
    object,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                _IDS,
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]


class Message(Body):
    """One turn. `content` is null, a string or parts; messages.py looks inside."""

    role: Role
    content: Content = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, object]], Field(max_length=1024)] | None = None
    function_call: dict[str, object] | None = None
    tool_call_id: str | None = None


class StreamOptions(Body):
    """`chunk_by` and `chunk_size` are ZSE's: larger deltas, cut where a word, a sentence or a count of tokens
    ends. `include_obfuscation` pads deltas only where it is asked for.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    chunk_by: Literal["token", "word", "sentence"] | None = None
    chunk_size: Annotated[int, Field(ge=1, le=1024)] | None = None


class GenerationBody(Body):
    """What both routes take."""

    model: str | None = None
    lora_id: str | None = None  # zse-engine's name for the adapter
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None
    ) = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    stop: StopStrings = None
    stop_token_ids: Annotated[list[int], Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`

    Some fields of OpenAI's are left out on purpose, because an answer that ignores them is still the one that
    was asked for: `user`, `metadata`, `safety_identifier` and `store` are notes to the operator,
    `prompt_cache_*` and `prediction` hints for speed, `parallel_tool_calls` says nothing without tools.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None


def _false_is_none(value: object) -> object:
    return None if value is False else value


class CompletionBody(GenerationBody):
    """`POST /v1/completions`; prompt_values.py looks inside `prompt`."""

    prompt: Prompts
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    logprobs: Annotated[Annotated[int, Field(ge=0, le=5)] | None, BeforeValidator(_false_is_none)] = None
    add_special_tokens: bool | None = None


_COMMON: Mapping[str, tuple[object, ...]] = {
    "adapter_source": ("local",),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "ec_transfer_params": ({},),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "priority": (0,),
    "prompt_embeds": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stream_interval": (1,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}

CHAT_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **_COMMON,
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guideline": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tool_prompt": (),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Known to chat clients, not served: the values that ask for nothing. Null always does."""

COMPLETION_NEUTRAL: Mapping[str, tuple[object, ...]] = {**_COMMON, "suffix": ("",)}
