"""Body of OpenAI's embeddings route, with the fields of vLLM that clients have come to send."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from server.api.adapter_fields import AdapterFields
from server.api.openai.schema import Prompts
from server.types import Pooling


class EmbeddingsBody(AdapterFields):
    """`POST /v1/embeddings`; `user` is a note to the operator and ignored."""

    input: Prompts
    model: str | None = None
    lora_id: str | None = None  # zse-engine's name for the adapter
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["mean", "last"] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None  # -1: what the context holds

    @property
    def wanted_pooling(self) -> Pooling:
        return Pooling(self.pooling or "mean")


NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "messages": (),
    "normalize": (True,),
    "priority": (0,),
    "truncation_side": ("right",),
    "use_activation": (True,),
}
"""Known to clients, not served: the values that ask for nothing. Null always does."""
