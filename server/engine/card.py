"""What the served base model is called and what it can do: everything about it that protocols may tell a
client.
"""

from dataclasses import dataclass, field
from typing import Final

from server.types import SamplingDefaults

_ALIASES: Final = frozenset({"", "default", "tgi", "dummy", "__base_model__"})
"""Names that clients send when they mean "the model you have"; accepted, never listed."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    id: str  # first of the served names; what lists show
    served_names: tuple[str, ...]
    max_model_len: int  # prompt plus answer, in tokens
    created: int  # unix time, seconds
    dtype: str  # "float32", "bfloat16" or "float16"
    device: str  # "cpu" or "cuda:0"
    compute_type: str  # "cpu" or "gpu"
    fingerprint: str  # changes whenever the same request may be answered differently
    vocab_size: int  # ids below this are tokens of the model; its tokenizer may know more
    kv_tokens: int = 0  # positions of the KV cache: what all running sequences together can hold
    family: str = ""  # what the checkpoint calls its kind of model, e.g. "llama"
    num_parameters: int = 0
    num_bytes: int = 0  # of the weights, as they are computed with
    num_layers: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    generation_defaults: SamplingDefaults = field(default=SamplingDefaults())
    sha: str | None = None  # revision of the checkpoint, if it says
    hidden_size: int = 0  # numbers in a hidden state
    quantization: str = "none"  # or "int8", "int4"

    def is_base(self, name: str | None) -> bool:
        """Whether a client that says `name` means the base model. None: it said nothing."""
        return name is None or name in self.base_names

    @property
    def base_names(self) -> frozenset[str]:
        """All that mean the base model; no adapter may have one of them."""
        return _ALIASES.union(self.served_names)
