"""All decoder layers of a step in one call of our own kernels (`decoder.h`).

    hidden -> [norm  q k v  rotate  attend  o]  +  [norm  gate up  silu  down]  +  ... -> hidden

A model whose layers have this shape gets one module in the place of their list. Between the layers there is
no Python then, and the interpreter is free for the whole of a step. Names alone do not tell whether a layer
has the shape: some models scale a residual, or rotate in some layers or in half of a head only. So the model
is watched while it computes a small step, each layer has to give what was seen of it, and then the model has
to give the same with the new module in place. If it does not, it keeps its own.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.batch import LoraBatch
from adapters.kernels.native.bindings import NativeStep
from adapters.kernels.native.kernel import NativeKernel
from adapters.layers import LoraContext, LoraLinear, decoder_layers
from server.model.attention import LayerSpec, StepContext
from server.model.native.bindings import Angles, NativeKernels, RMSNorm
from server.model.native.linear import NativeLinear, QuantizedLinear
from server.model.native.structures import Layer, Linear, bits_of_cache
from server.model.native.trial import SmallStep, hidden_states, is_near
from server.model.probe import FORWARD_ERRORS

_NORMS = {"input_norm": "input_layernorm", "inner_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}
_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_TOLERANCE_OF_ALL = 0.25  # roundings add up over the layers; a layer that was left out would not be near
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of the largest value; another formula is far off
_QUANTIZED_TOLERANCE = 4e-2  # a number that is rounded elsewhere goes to another of few


class NativeDecoder(nn.Module):
    """In the place of a model's decoder layers. They stay below it, and own the weights."""

    def __init__(
        self,
        layers: nn.ModuleList,
        table: Sequence[Layer],
        kernels: NativeKernels,
        context: StepContext,
        lora: LoraContext,
    ) -> None:
        """`table` describes the layers, in their order."""
        super().__init__()
        self.layers = layers
        self._kernels = kernels
        self._context = context
        self._lora = lora
        self._table = (Layer * len(table))(*table)
        self._keys: Sequence[Tensor] = ()  # those whose addresses are in the table

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **seen: Any
    ) -> Tensor:
        """hidden_states [1, T, H], cosine and sine [1, T, D] -> [1, T, H]"""
        if not self.can_decode:
            for layer in self.layers:
                hidden_states = layer(hidden_states, position_embeddings=position_embeddings, **seen)
            return hidden_states
        hidden = _own(hidden_states)
        self.decode(hidden, angles_of_tokens(*position_embeddings))
        return hidden[None]

    @property
    def can_decode(self) -> bool:
        """Whether this step is for these kernels: its adapters may be for others."""
        lora = self._lora.batch
        return lora is None or isinstance(lora.arena.kernel, NativeKernel)

    def decode(self, hidden: Tensor, angles: Angles, last_norm: RMSNorm | None = None) -> None:
        """All layers, and the norm after them, if it is given: hidden [T, H] in place."""
        if self._context.batch is None:
            raise RuntimeError("the model was called outside a step")
        if self._keys is not self._context.keys:
            self._keys = self._context.keys
            for row, keys, values in zip(self._table, self._keys, self._context.values, strict=True):
                row.keys, row.values = keys.data_ptr(), values.data_ptr()
        self._decode(self._table, hidden, angles, last_norm)

    def _decode(
        self, table: "ctypes.Array[Layer]", hidden: Tensor, angles: Angles, last_norm: RMSNorm | None = None
    ) -> None:
        batch, lora, wanted = self._context.batch, self._lora.batch, self._context.wanted
        assert lora is None or lora.num_tokens == len(hidden), "the layers do not see the tokens of the step"
        if wanted is not None and len(wanted) == len(hidden):
            wanted = None
        self._kernels.decode(
            table,
            hidden,
            angles,
            batch.places,
            batch.sequences,
            batch.blocks,
            block_size=self._context.block_size,
            cache_bits=bits_of_cache(self._context.keys[0]),
            adapters=_native_step(lora),
            wanted=None if wanted is None else torch.tensor(wanted, dtype=torch.int64),
            wanted_adapters=None if wanted is None or lora is None else _native_step(lora.among(wanted)),
            last_norm=last_norm,
            seconds=self._context.seconds,
        )

    def agrees(self, index: int, call: "_Call", keys: Tensor, values: Tensor) -> bool:
        """Whether a layer alone gives what its modules gave. `keys` and `values`: a cache for it."""
        row = Layer.from_buffer_copy(self._table[index])
        if call.angles[0].shape[-1] != row.head_dim:
            return False
        row.keys, row.values = keys.data_ptr(), values.data_ptr()
        found = _own(call.hidden)
        self._decode((Layer * 1)(row), found, angles_of_tokens(*call.angles))
        return is_near(found[None], call.answer, self._tolerance)

    @property
    def dtype(self) -> torch.dtype:
        """Of what it computes with."""
        return self._kernels.dtype

    @property
    def _tolerance(self) -> float:
        has_few_bits = self._table[0].q.bits or bits_of_cache(self._context.keys[0])
        return _QUANTIZED_TOLERANCE if has_few_bits else _TOLERANCE[self._kernels.dtype]


def angles_of_tokens(cosine: Tensor, sine: Tensor) -> Angles:
    """Of cosines and sines [1, T, D], a row for each token."""
    return Angles(cosine[0].contiguous(), sine[0].contiguous(), torch.arange(cosine.shape[1]))


def _own(hidden: Tensor) -> Tensor:
    """[1, T, H] -> [T, H] to write to."""
    return hidden[0].clone(memory_format=torch.contiguous_format)


def _native_step(lora: LoraBatch | None) -> NativeStep | None:
    if lora is None:
        return None
    assert isinstance(lora.arena.kernel, NativeKernel)
    return lora.arena.kernel.step(lora)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A layer at work, as it was seen."""

    hidden: Tensor  # [1, T, H]
    angles: tuple[Tensor, Tensor]  # cosine and sine [1, T, D]
    answer: Tensor  # [1, T, H]


def fuse_layers(
    module: nn.Module, body: nn.Module, lora: LoraContext, kernels: NativeKernels, step: SmallStep
) -> NativeDecoder | None:
    """Put a NativeDecoder in the place of a model's layers, if it computes the same. Packed and wrapped they
    must be, and attend by NativeAttention. `body` is the child of `module` that they are in.
    """
    path, layers = decoder_layers(module)
    rows = (_describe(layer, spec, kernels) for layer, spec in zip(layers, step.specs, strict=True))
    table = [row for row in rows if row is not None]
    if len(table) < len(layers) or len({_sizes(row) for row in table}) > 1:
        return None
    context = step.context
    decoder = NativeDecoder(layers, table, kernels, context, lora)
    path_of_parent, _, name = path.rpartition(".")
    parent = module.get_submodule(path_of_parent)
    with torch.inference_mode(), step.running() as ids:
        calls, expected = _watch(body, layers, ids)
        if len(calls) < len(layers) or any(call.angles is not calls[0].angles for call in calls):
            return None
        keys, values = context.keys[0], context.values[0]
        if not all(decoder.agrees(index, call, keys, values) for index, call in enumerate(calls)):
            return None
        setattr(parent, name, nn.ModuleList([decoder]))
        try:
            is_same = is_near(hidden_states(body, ids), expected, _TOLERANCE_OF_ALL)
        except FORWARD_ERRORS:
            is_same = False
        if not is_same:
            setattr(parent, name, layers)
    return decoder if is_same else None


def _watch(body: nn.Module, layers: nn.ModuleList, ids: Tensor) -> tuple[list[_Call], Tensor]:
    """What each layer was asked and answered, where it was asked as usual, and what came out of them all."""
    calls: list[_Call] = []

    def note(layer: nn.Module, args: tuple[Any, ...], seen: dict[str, Any], answer: Any) -> None:
        hidden, angles = (*args, seen.get("hidden_states"))[0], seen.get("position_embeddings")
        if isinstance(hidden, Tensor) and isinstance(answer, Tensor) and isinstance(angles, tuple):
            calls.append(_Call(hidden, angles, answer))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        return calls, hidden_states(body, ids)
    finally:
        for hook in hooks:
            hook.remove()


def _describe(layer: nn.Module, spec: LayerSpec, kernels: NativeKernels) -> Layer | None:
    """The layer as the kernels see it, without its cache; None where it has another shape."""
    parts = dict(layer.named_modules())
    norms = {field: parts.pop(name, None) for field, name in _NORMS.items()}
    norms |= {field: parts.pop(f"self_attn.{name}", None) for field, name in _HEAD_NORMS.items()}
    linears: dict[str, Linear] = {}
    for field, name in _LINEARS.items():
        linear = _describe_linear(parts.get(name), kernels)
        if linear is None:
            return None
        linears[field] = linear
    if norms["input_norm"] is None or norms["inner_norm"] is None:
        return None
    epsilons = {getattr(norm, "variance_epsilon", None) for norm in norms.values() if norm is not None}
    weights = [norm.weight for norm in norms.values() if norm is not None]
    scale = getattr(parts["self_attn"], "scaling", None)
    if None in epsilons or len(epsilons) > 1 or not isinstance(scale, float):
        return None
    if any(weight.dtype is not kernels.dtype for weight in weights):
        return None
    row = Layer(
        **linears,
        **{field: norm.weight.data_ptr() for field, norm in norms.items() if norm is not None},
        num_heads=linears["q"].num_out // spec.key_dim,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.key_dim,
        window=spec.sliding_window or 0,
        epsilon=epsilons.pop(),
        scale=scale,
    )
    return row if _fits(row, spec, len(weights[0])) else None


def _describe_linear(module: nn.Module | None, kernels: NativeKernels) -> Linear | None:
    base = module.base if isinstance(module, LoraLinear) else None
    if not isinstance(base, NativeLinear | QuantizedLinear) or base.dtype is not kernels.dtype:
        return None
    assert isinstance(module, LoraLinear)
    bias = None if base.bias is None else base.bias.data_ptr()
    if isinstance(base, NativeLinear):
        weight, scales, bits = base.packed.data_ptr(), None, 0
    else:
        numbers, its_scales, bits = base.packed
        weight, scales = numbers.data_ptr(), its_scales.data_ptr()
    return Linear(weight, scales, bias, base.in_features, base.out_features, bits, module.target)


def _fits(row: Layer, spec: LayerSpec, hidden_size: int) -> bool:
    """Whether what comes out of each part is what the next one takes."""
    num_queries, num_keys = row.num_heads * row.head_dim, row.num_kv_heads * row.head_dim
    return (
        spec.key_dim == spec.value_dim
        and row.num_heads % row.num_kv_heads == 0
        and len({getattr(row, field).bits for field in _LINEARS}) == 1
        and {row.q.num_in, row.k.num_in, row.v.num_in, row.gate.num_in, row.up.num_in} == {hidden_size}
        and {row.o.num_out, row.down.num_out} == {hidden_size}
        and row.q.num_out == row.o.num_in == num_queries
        and row.k.num_out == row.v.num_out == num_keys
        and row.gate.num_out == row.up.num_out == row.down.num_in
    )


def _sizes(row: Layer) -> tuple[int, ...]:
    """What all layers of a model must have in common."""
    return (
        bool(row.q.scales),
        row.q.num_in,
        row.q.num_out,
        row.k.num_out,
        row.gate.num_out,
        row.num_kv_heads,
        row.head_dim,
    )
