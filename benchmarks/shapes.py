"""The real model shapes that numbers are quoted for, as data.

A shape is what decides speed: sizes, head counts, vocabulary, tied or untied head, rope. The weights
themselves may be noise. `make_model` turns a shape into a checkpoint, and the names are the ones a reader
knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything of a published config that changes how long a step takes."""

    name: str
    architecture: str  # transformers' model type: "qwen2" or "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_position: int
    ties_embeddings: bool
    rms_norm_eps: float
    rope: Mapping[str, str | float | int]
    trained_vocab: int = 32_000  # how much of the vocabulary is learnt from text; the rest are fillers


_QWEN_ROPE: Mapping[str, str | float | int] = MappingProxyType(
    {"rope_type": "default", "rope_theta": 1_000_000.0}
)
_LLAMA31_ROPE: Mapping[str, str | float | int] = MappingProxyType(
    {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
)

SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("tiny", "qwen2", 1024, 64, 160, 2, 4, 2, 4096, True, 1e-6, _QWEN_ROPE, trained_vocab=1000),
            Shape("qwen2.5-0.5b", "qwen2", 151_936, 896, 4864, 24, 14, 2, 32_768, True, 1e-6, _QWEN_ROPE),
            Shape("qwen2.5-7b", "qwen2", 152_064, 3584, 18_944, 28, 28, 4, 32_768, False, 1e-6, _QWEN_ROPE),
            Shape(
                "llama-3.1-8b", "llama", 128_256, 4096, 14_336, 32, 32, 8, 131_072, False, 1e-5, _LLAMA31_ROPE
            ),
        )
    }
)
