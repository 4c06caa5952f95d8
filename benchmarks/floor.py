"""The least time a checkpoint can take on a machine, from sizes alone. Standard library only.

Decoding reads every weight once a step, whatever the batch; prefill multiplies every weight with every token.
So with a machine that reads B bytes and computes F operations a second

    decode step of c users     max(bytes / B, operations / F)
        bytes       weights + KV of all users' contexts + each distinct adapter once
        operations  c x 2 x (weights of the layers, the head, and the user's adapter)
    prefill of c prompts       max(weights / B, operations / F)
        operations  per prompt: tokens x 2 x weights of the layers + attention + the head once; of the last
                    layer for the last token alone, as nobody reads what the others become there

A load of c users that start together takes at least the prefill of c prompts and `output - 1` steps. A server
that mixes one user's prefill into the others' steps may hide some of one under the other, so a share above
100 % is not impossible; it only never happened. An embedding that is not also the head is looked up and not
read; a mixture of experts is counted as if each token met all of them.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

WEIGHT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class Machine:
    """What it can do at best, as measured."""

    read_bytes_per_s: float
    operations_per_s: float  # of matrix products in the served dtype


@dataclass(frozen=True, slots=True)
class Cost:
    """What a checkpoint asks of a machine. A weight is two operations a token: multiply and add."""

    step_bytes: int  # weights that a decode step reads
    layer_weights: int  # of matrices in the layers
    num_layers: int
    head_weights: int
    kv_bytes_per_token: int
    attention_width: int  # layers x query heads x head size: 4 operations each a (query, key) pair
    adapter_bytes: float = 0.0  # mean of the adapters in use
    adapter_weights: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """c users, each with a prompt and an answer, over some adapters."""

    users: int
    prompt_tokens: int
    output_tokens: int
    adapters: int = 0  # distinct ones; 0: base model only


@dataclass(frozen=True, slots=True)
class Floor:
    prefill_s: float  # of all users' prompts
    step_s: float  # of one decode step over all users
    output_tokens_per_s: float


def floor_of(machine: Machine, cost: Cost, load: Load) -> Floor:
    distinct = min(load.users, load.adapters)
    adapter_weights = cost.adapter_weights if load.adapters else 0.0
    adapter_bytes = distinct * cost.adapter_bytes

    tokens = load.prompt_tokens - (load.prompt_tokens - 1) / cost.num_layers  # that a layer has, on average
    pairs = tokens * (load.prompt_tokens + 1) / 2  # causal: a token sees itself and those before
    prompt_operations = (
        2 * tokens * (cost.layer_weights + adapter_weights)
        + 4 * cost.attention_width * pairs
        + 2 * cost.head_weights  # only the last token's logits are needed
    )
    prefill_s = max(
        (cost.step_bytes + adapter_bytes) / machine.read_bytes_per_s,
        load.users * prompt_operations / machine.operations_per_s,
    )

    context = load.prompt_tokens + load.output_tokens / 2  # on average over the answer
    token_operations = (
        2 * (cost.layer_weights + cost.head_weights + adapter_weights) + 4 * cost.attention_width * context
    )
    step_s = max(
        (cost.step_bytes + adapter_bytes + load.users * context * cost.kv_bytes_per_token)
        / machine.read_bytes_per_s,
        load.users * token_operations / machine.operations_per_s,
    )
    total_s = prefill_s + (load.output_tokens - 1) * step_s
    return Floor(prefill_s, step_s, load.users * load.output_tokens / total_s)


def cost_of(model: Path, adapters: Sequence[Path] = ()) -> Cost:
    """Read the sizes off a checkpoint's config and headers; no weight is loaded."""
    config = json.loads((model / "config.json").read_text())
    config = config.get("text_config") or config
    tensors = dict(tensor for file in sorted(model.glob("*.safetensors")) for tensor in headers(file))
    if not tensors:
        raise FileNotFoundError(f"{model} holds no .safetensors files")
    embedding = sum(size.count for name, size in tensors.items() if "embed_tokens" in name or ".wte." in name)
    embedding_bytes = sum(
        size.num_bytes for name, size in tensors.items() if "embed_tokens" in name or ".wte." in name
    )
    head = sum(size.count for name, size in tensors.items() if "lm_head" in name)
    matrices = sum(size.count for size in tensors.values() if len(size.shape) >= 2)
    total_bytes = sum(size.num_bytes for size in tensors.values())
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    num_layers = config["num_hidden_layers"]
    weight_bytes = total_bytes // sum(size.count for size in tensors.values())
    runs = [dict(headers(folder / "adapter_model.safetensors")) for folder in adapters]
    return Cost(
        step_bytes=total_bytes - (embedding_bytes if head else 0),
        layer_weights=matrices - embedding - head,
        num_layers=num_layers,
        head_weights=head or embedding,
        kv_bytes_per_token=2 * num_layers * kv_heads * head_size * weight_bytes,
        attention_width=num_layers * heads * head_size,
        adapter_bytes=_mean([sum(size.num_bytes for size in run.values()) for run in runs]),
        adapter_weights=_mean([sum(size.count for size in run.values()) for run in runs]),
    )


@dataclass(frozen=True, slots=True)
class TensorSize:
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def count(self) -> int:
        return prod(self.shape)


def headers(file: Path) -> Iterator[tuple[str, TensorSize]]:
    """Names and sizes in a safetensors file: eight bytes of length, then that much JSON."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: Mapping[str, dict[str, list[int]]] = json.loads(opened.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield name, TensorSize(tuple(entry["shape"]), stop - start)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
