"""Paged attention behind transformers' attention interface: what all ways to compute it have in common.

The whole batch reaches the model flattened to one row of T tokens; nothing but attention mixes tokens, so
attention is the only place that has to know which token belongs to which sequence. One function is registered
with transformers. It finds its work through the module it is called for: the loader puts a hook on every
attention module, and the hooks of an engine share a `StepContext`, in which the runner leaves the description
of the step before each forward.

    T tokens  [ decode rows, longest first ........ | chunk | chunk .. ]
                one query token each                  many query tokens each, one sequence per chunk

How keys and values lie in memory, how a step is described and who computes it belong together: that is an
`AttentionKernels`. `torch_attention` computes everything on every device, `native.attention` most of it on
CPUs that have what it takes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from server.model.transfer import Numbers

ATTENTION_NAME = "motet_paged"
LAYER_ATTRIBUTE = "motet_layer"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer keeps and how it attends, as the probe found it."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None  # a query at q sees keys k with q - window < k <= q
    softcap: float | None
    has_sinks: bool = False  # logits beside those of the keys


class AttentionHook(Protocol):
    """What may sit on an attention module: a layer of an engine, or the probe."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        sinks: Tensor | None,
        **seen: Any,
    ) -> Tensor: ...


class StepContext:
    """What the layers of one engine share: the KV tensors, and the description of the step that runs."""

    __slots__ = ("batch", "block_size", "keys", "seconds", "values", "wanted")

    def __init__(self) -> None:
        self.batch: Any = None  # what the engine's AttentionKernels made of the step; None: no step
        # Of its tokens, ascending: those whose hidden states are read after the layers; None: all.
        self.wanted: Sequence[int] | None = None
        self.block_size = 0
        # Of linear layers, adapters, attention and the rest, where one call computes all layers: else zeros.
        self.seconds = torch.zeros(4, dtype=torch.float64)
        self.keys: Sequence[Tensor] = ()  # by layer, in the shape that the kernels ask for
        self.values: Sequence[Tensor] = ()


class AttentionLayer(ABC):
    """One attention layer of one engine."""

    __slots__ = ("_context", "_index", "_spec")

    def __init__(self, index: int, spec: LayerSpec, context: StepContext) -> None:
        self._index = index
        self._spec = spec
        self._context = context

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        sinks: Tensor | None,
        **seen: Any,
    ) -> Tensor:
        """Write the step's keys and values, then attend. Never synchronises with the device.

        query [1, Hq, T, Dk], key [1, Hk, T, Dk], value [1, Hk, T, Dv], keys already rotated; returns
        [1, T, Hq, Dv].
        """
        context = self._context
        if context.batch is None:
            raise RuntimeError("the model was called outside a step")
        dtype = self._operand_dtype()
        # the casts do nothing except in models whose norms leave keys in float32
        q, k, v = (operand[0].to(dtype) for operand in (query, key, value))
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return self._attend(context.batch, q, k, v, scale, sinks)[None].to(query.dtype)

    def _operand_dtype(self) -> torch.dtype:
        """What queries, keys and values are computed in."""
        return self._context.keys[self._index].dtype

    @abstractmethod
    def _attend(
        self, batch: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """The same without transformers' batch dimension: operands [H, T, D] -> [T, Hq, Dv]."""


@dataclass(frozen=True, slots=True)
class QuerySpan:
    """Consecutive queries of one sequence, whose keys lie in these blocks."""

    start: int  # position of the first in the sequence
    num_tokens: int
    block_table: Sequence[int]


class StepDescription(Protocol):
    """A step before its numbers are on the device."""

    def to_device(self, numbers: Tensor, kv_index: Tensor) -> Any:
        """The description as layers want it. kv_index [T]: where each token's key and value are written."""
        ...


class AttentionKernels(Protocol):
    """One way to attend. Has no state."""

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of keys and values in the cache, for layers that compute in `dtype`."""
        ...

    def shapes(
        self, layer: LayerSpec, num_blocks: int, block_size: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a layer's keys and values; the first dimension is that of blocks or of positions."""
        ...

    def clear(self, cache: Tensor, positions: Tensor) -> None:
        """Make harmless what lies at these positions [n] (block * block size + offset), which nobody has
        written, of keys or of values.
        """
        ...

    def layer(self, index: int, spec: LayerSpec, context: StepContext) -> AttentionLayer:
        """What sits on the attention module of a layer."""
        ...

    def describe(
        self,
        spans: Sequence[QuerySpan],
        numbers: Numbers,
        *,
        windows: Iterable[int | None],
        block_size: int,
        dtype: torch.dtype,
    ) -> StepDescription:
        """A step of these spans: those of one token first, the longest context first among them. `windows`
        are the distinct sliding windows of the layers. What the device must know is added to `numbers`.
        """
        ...


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **seen: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls. What is `seen` beside the operands (mask, window, cap) was so in the
    probe, which refuses models that bring a mask of their own.
    """
    hook: AttentionHook = getattr(module, LAYER_ATTRIBUTE)
    return hook.attend(query, key, value, scaling, s_aux, attention_mask=attention_mask, **seen), None


def register_attention() -> None:
    """Make the name known to transformers. Process-wide and idempotent: the function holds no state."""
    if ATTENTION_NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
