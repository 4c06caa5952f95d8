"""What the compiled functions read: structures of `decoder.h`, `attention.h`, `linear.h` and `quantized.h`.

Each holds addresses and sizes. Who makes one keeps alive what it points to.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_int64

SCALE_BYTES = 4
"""A token has this much more, for each head, in a cache of eight bits."""


class SequenceRow(NamedTuple):
    """A sequence of a step, as attention sees it."""

    token: int  # its first in the step
    num_queries: int  # the last ones of its keys
    num_keys: int
    table: int  # where its blocks begin among those of all


class Linear(ctypes.Structure):
    """A linear layer of a decoder layer."""

    _fields_ = (
        ("weight", _ADDRESS),  # packed
        ("scales", _ADDRESS),  # of weights of few bits
        ("bias", _ADDRESS),
        ("num_in", _SIZE),
        ("num_out", _SIZE),
        ("bits", _SIZE),  # of the weights; 0: they are numbers
        ("target", _SIZE),  # a TargetId
    )


class Layer(ctypes.Structure):
    """A decoder layer. The owner of all that it points to keeps it alive."""

    _fields_ = (
        ("q", Linear),
        ("k", Linear),
        ("v", Linear),
        ("o", Linear),
        ("gate", Linear),
        ("up", Linear),
        ("down", Linear),
        ("input_norm", _ADDRESS),
        ("inner_norm", _ADDRESS),
        ("query_norm", _ADDRESS),
        ("key_norm", _ADDRESS),
        ("keys", _ADDRESS),  # the cache
        ("values", _ADDRESS),
        ("num_heads", _SIZE),
        ("num_kv_heads", _SIZE),
        ("head_dim", _SIZE),
        ("window", _SIZE),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class Step(ctypes.Structure):
    """All that the decoder layers share."""

    _fields_ = (
        ("hidden", _ADDRESS),
        ("num_tokens", _SIZE),
        ("hidden_size", _SIZE),
        ("cosine", _ADDRESS),
        ("sine", _ADDRESS),
        ("positions", _ADDRESS),
        ("places", _ADDRESS),
        ("sequences", _ADDRESS),
        ("num_sequences", _SIZE),
        ("blocks", _ADDRESS),
        ("block_size", _SIZE),
        ("cache_bits", _SIZE),  # 0: keys and values are numbers
        ("adapters", _ADDRESS),
        ("wanted", _ADDRESS),
        ("num_wanted", _SIZE),
        ("wanted_adapters", _ADDRESS),
        ("last_norm", _ADDRESS),
        ("last_epsilon", ctypes.c_double),
        ("seconds", _ADDRESS),
    )


class Product(ctypes.Structure):
    """Of rows and a packed weight."""

    _fields_ = (
        ("x", _ADDRESS),
        ("x_stride", _SIZE),
        ("w", _ADDRESS),
        ("bias", _ADDRESS),
        ("y", _ADDRESS),
        ("y_stride", _SIZE),
        ("num_in", _SIZE),
        ("num_out", _SIZE),
    )


class QuantizedProduct(ctypes.Structure):
    """The same with a weight of few bits."""

    _fields_ = (
        ("x", _ADDRESS * 3),  # quantised rows, which the library makes itself
        ("w", _ADDRESS),
        ("scales", _ADDRESS),
        ("bias", _ADDRESS),
        ("y", _ADDRESS),
        ("y_stride", _SIZE),
        ("num_in", _SIZE),
        ("num_out", _SIZE),
        ("bits", _SIZE),
    )


class Heads(ctypes.Structure):
    """[heads, tokens, dim] in whatever order; dim is adjacent."""

    _fields_ = (("data", _ADDRESS), ("token_stride", _SIZE), ("head_stride", _SIZE))

    @classmethod
    def of(cls, tensor: Tensor) -> "Heads":
        return cls(tensor.data_ptr(), tensor.stride(1), tensor.stride(0))


class Cache(ctypes.Structure):
    """Keys and values of a layer, in blocks."""

    _fields_ = (
        ("keys", _ADDRESS),
        ("values", _ADDRESS),
        ("block_size", _SIZE),
        ("num_kv_heads", _SIZE),
        ("key_dim", _SIZE),
        ("value_dim", _SIZE),
        ("bits", _SIZE),  # 8, or 0: they are numbers
    )

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, key_dim: int, value_dim: int) -> "Cache":
        bits = bits_of_cache(keys)
        block_size = keys.shape[2] // (key_dim + SCALE_BYTES) if bits else keys.shape[3]
        return cls(keys.data_ptr(), values.data_ptr(), block_size, keys.shape[1], key_dim, value_dim, bits)


class Attention(ctypes.Structure):
    """What a layer's queries attend to."""

    _fields_ = (
        ("q", Heads),
        ("out", _ADDRESS),
        ("cache", Cache),
        ("blocks", _ADDRESS),
        ("num_heads", _SIZE),
        ("window", _SIZE),
        ("scale", ctypes.c_float),
    )


def bits_of_cache(keys: Tensor) -> int:
    """Of each number in a cache; 0: they are in the dtype of the kernels."""
    return 8 if keys.dtype is torch.int8 else 0
