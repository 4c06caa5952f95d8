"""How PEFT spells the tensors of an adapter: the only module that knows it.

    base_model.model.  model.layers.0.self_attn.q_proj  .lora_A  [.default]  .weight
    prefix             module path in the served model   half     adapter's own name, in some files

Everything else that a PEFT file may hold belongs to a feature, and is refused by the feature's name.
"""

import re
from dataclasses import dataclass
from typing import Literal

from adapters.errors import AdapterInvalid

Half = Literal["A", "B"]
"""A [rank, in] comes first, B [out, rank] second: y += B (A x)."""

_MAX_SHOWN_CHARS = 160
_KEY = re.compile(
    r"base_model\.model\.(?P<module>[^\s.]+(?:\.[^\s.]+)*)\.lora_(?P<half>[AB])(?:\.[^\s.]+)?\.weight"
)
_FEATURES = (
    (re.compile(r"\.lora_embedding_[AB]"), "an adapter of the embeddings, which is not served yet"),
    (re.compile(r"\.lora_magnitude_vector|\.lora_magnitude"), "part of DoRA, which is not served yet"),
    (re.compile(r"\.lora_[AB](?:\.[^.]+)?\.bias$"), "part of lora_bias, which is not served yet"),
    (
        re.compile(r"trainable_tokens|token_adapter"),
        "part of trainable_token_indices, which is not served yet",
    ),
    (re.compile(r"\.modules_to_save\."), "part of modules_to_save, which is not served yet"),
    (re.compile(r"\.base_layer\."), "a weight of the base model, which an adapter may not replace"),
    (re.compile(r"\.bias$"), "a trained bias, which is not served yet"),
    (
        re.compile(r"^base_model\.model\.(?!.*\.lora_).*\.weight$"),
        "a whole weight (modules_to_save), which is not served yet",
    ),
)


@dataclass(frozen=True, slots=True)
class TensorName:
    """Which half of which module's adapter a tensor is."""

    module: str
    half: Half


def parse_key(key: str) -> TensorName:
    """Raises AdapterInvalid for every other spelling, with the feature it belongs to where that is known."""
    match = _KEY.fullmatch(key)
    if match is not None:
        return TensorName(match["module"], "A" if match["half"] == "A" else "B")
    for pattern, meaning in _FEATURES:
        if pattern.search(key):
            raise AdapterInvalid(f"tensor {shown(key)} is {meaning}")
    raise AdapterInvalid(f"tensor {shown(key)} is not part of a LoRA adapter in PEFT's format")


def format_key(name: TensorName) -> str:
    """The spelling that PEFT writes."""
    return f"base_model.model.{name.module}.lora_{name.half}.weight"


def shown(text: object) -> str:
    """A stranger's text for a message: quoted, printable, and not longer than a line."""
    quoted = ascii(text)
    if len(quoted) <= _MAX_SHOWN_CHARS:
        return quoted
    return f"{quoted[: _MAX_SHOWN_CHARS // 2]}...{quoted[-_MAX_SHOWN_CHARS // 4 :]}"
