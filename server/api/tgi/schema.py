"""Bodies of the LoRAX / TGI routes. Ranges are checked where they are used, in the words that their clients
know.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import WithJsonSchema

from server.api.adapter_fields import AdapterFields, MergedAdapters
from server.api.schema import Body, StopStrings

TokenIds = Annotated[object, WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}})]


class Parameters(AdapterFields):
    """`parameters` of a request; LoRAX's fields and TGI's, and `lora`."""

    adapter_id: str | None = None
    merged_adapters: MergedAdapters | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    best_of: int | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: StopStrings = None
    truncate: int | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = None
    top_n_tokens: int | None = None
    apply_chat_template: bool | None = None
    seed: int | None = None


class GenerateBody(Body):
    """`POST /generate`, `/generate_stream`, and with `stream` also `/` and `/invocations`."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None


class TokenizeBody(Body):
    """`POST /tokenize`"""

    inputs: str
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`, vLLM's; tokens.py looks inside `tokens`."""

    tokens: TokenIds


NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "grammar": (),
    "guideline": (),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "watermark": (False,),
}
"""Known to clients, not served: the values that ask for nothing. Null always does."""
