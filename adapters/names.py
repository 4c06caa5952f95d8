"""How PEFT spells the tensors of an adapter: the only module that knows it.

    base_model.model.  model.layers.0.self_attn.q_proj  .lora_A  [.default]  .weight
    prefix             module path in the served model   part     adapter's own name, in some files

Everything else that a PEFT file may hold belongs to a feature, and is refused by the feature's name.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from adapters.errors import AdapterInvalid


class Part(StrEnum):
    """What a tensor is to its module. The value is for messages."""

    A = "lora_A"  # [rank, in]
    B = "lora_B"  # [out, rank]: y += B (A x)
    BIAS = "lora_B.bias"  # [out]: y += B (A x) + bias
    MAGNITUDE = "lora_magnitude_vector"  # [out]: DoRA's length of each row of W + B A
    EMBEDDING_A = "lora_embedding_A"  # [rank, tokens]
    EMBEDDING_B = "lora_embedding_B"  # [out, rank]
    ROWS = "token_adapter.trainable_tokens_delta"  # [tokens, width]: in place of the base's rows
    BASE = "weight"  # the base model's own weight, saved along


_MAX_SHOWN_CHARS = 160
_MODULE = r"(?P<module>[^\s.]+(?:\.[^\s.]+)*?)"
_NAME = r"(?:\.[^\s.]+)?"
_SPELLINGS = tuple(
    (part, re.compile(rf"base_model\.model\.{spelling}"))
    for part, spelling in (
        (Part.A, rf"{_MODULE}\.lora_A{_NAME}\.weight"),
        (Part.B, rf"{_MODULE}\.lora_B{_NAME}\.weight"),
        (Part.BIAS, rf"{_MODULE}\.lora_B{_NAME}\.bias"),
        (Part.MAGNITUDE, rf"{_MODULE}\.lora_magnitude_vector{_NAME}(?:\.weight)?"),
        (Part.EMBEDDING_A, rf"{_MODULE}\.lora_embedding_A{_NAME}"),
        (Part.EMBEDDING_B, rf"{_MODULE}\.lora_embedding_B{_NAME}"),
        (Part.ROWS, rf"{_MODULE}\.token_adapter\.trainable_tokens_delta{_NAME}"),
        (
            Part.BASE,
            rf"(?!.*\.(?:lora_|modules_to_save\.)){_MODULE}(?:\.token_adapter)?(?:\.base_layer)?\.weight",
        ),
    )
)
_FEATURES = (
    (re.compile(r"\.modules_to_save\."), "part of modules_to_save, which is not served yet"),
    (re.compile(r"\.bias$"), "a trained bias, which is not served yet"),
)


@dataclass(frozen=True, slots=True)
class TensorName:
    """What a tensor is to which module."""

    module: str
    part: Part


def parse_key(key: str) -> TensorName:
    """Raises AdapterInvalid for every other spelling, with the feature it belongs to where that is known."""
    for part, spelling in _SPELLINGS:
        match = spelling.fullmatch(key)
        if match is not None:
            return TensorName(match["module"], part)
    for pattern, meaning in _FEATURES:
        if pattern.search(key):
            raise AdapterInvalid(f"tensor {shown(key)} is {meaning}")
    raise AdapterInvalid(f"tensor {shown(key)} is not part of a LoRA adapter in PEFT's format")


def format_key(name: TensorName) -> str:
    """The spelling that PEFT writes."""
    suffix = ".weight" if name.part in (Part.A, Part.B) else ""
    return f"base_model.model.{name.module}.{name.part.value}{suffix}"


def shown(text: object) -> str:
    """A stranger's text for a message: quoted, printable, and not longer than a line."""
    quoted = ascii(text)
    if len(quoted) <= _MAX_SHOWN_CHARS:
        return quoted
    return f"{quoted[: _MAX_SHOWN_CHARS // 2]}...{quoted[-_MAX_SHOWN_CHARS // 4 :]}"
