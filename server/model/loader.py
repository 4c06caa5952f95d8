"""From a checkpoint folder to a model that is ready to serve.

The order keeps the peak of memory low and refuses early: config alone, then weights (safetensors only,
nothing initialised at random), then the probe, then the linear layers are packed one by one, then wrapped for
adapters. No code of the checkpoint is ever run, and nothing is fetched.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapters import pages
from adapters.host_memory import Allocate
from adapters.kernels.native.compiled import cpu_has
from adapters.layers import LoraContext, find_targets, wrap_targets
from adapters.types import ModelTargets
from server.model.attention import (
    ATTENTION_NAME,
    LAYER_ATTRIBUTE,
    AttentionKernels,
    LayerSpec,
    StepContext,
    register_attention,
)
from server.model.base_weights import ModelWeights
from server.model.cpu_kernels import (
    CacheChoice,
    CpuKernels,
    KernelChoice,
    Quantization,
    computes_bfloat16,
    pick_kernels,
)
from server.model.errors import ModelInvalid, ModelNotFound, ModelNotSupported
from server.model.halves import plain_head
from server.model.native.attention import NativeAttention, can_attend
from server.model.native.bindings import NativeKernels
from server.model.native.body import shorten_body
from server.model.native.decoder import fuse_layers
from server.model.native.trial import SmallStep
from server.model.packed_embedding import share_head
from server.model.packed_linear import PackedLinear, pack_linears
from server.model.probe import architecture_name, check_config, find_body, max_position, probe_layers
from server.model.torch_attention import TorchAttention
from server.types import SamplingDefaults

Progress = Callable[[str, float], None]
"""Told (stage, fraction of it that is done)."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # in configs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A module whose forward needs `context.batch` and `lora.batch` set, and what is known about it."""

    module: nn.Module
    body: nn.Module  # computes its hidden states: a child of it or, with a `head`, a NativeBody
    head: nn.Module | None  # see `plain_head`
    layers: tuple[LayerSpec, ...]
    targets: ModelTargets
    weights: ModelWeights  # of the targets, for those who load adapters
    lora: LoraContext
    context: StepContext
    attention: AttentionKernels
    vocab_size: int
    hidden_size: int  # of what the body returns
    max_position: int  # tokens; the longest context that is computed exactly
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: frozenset[int]
    generation_defaults: SamplingDefaults
    num_parameters: int
    num_bytes: int  # of the parameters
    family: str  # what the checkpoint calls its kind of model
    native: NativeKernels | None  # our own kernels, where it is computed with them
    kernels: str  # in words, which ones compute its linear layers


def load_model(
    path: str | Path,
    *,
    dtype: str,
    device: str,
    progress: Progress,
    cpu_kernels: KernelChoice = "auto",
    quantization: Quantization = "none",
    kv_cache_dtype: CacheChoice = "auto",
    block_size: int = 16,
    allocate: Allocate = pages.zeros,
) -> LoadedModel:
    """Load the checkpoint in folder `path`. `dtype` is "auto" or a name in DTYPES. `block_size`: of the KV
    cache that it will have. `allocate` makes the memory of weights on a CPU.
    Raises ModelError.
    """
    folder = Path(path)
    progress("reading the configuration", 0.0)
    config = load_config(folder)
    check_config(config)
    target_device = torch.device(device)
    served_dtype = resolve_dtype(dtype, target_device, config, cpu_kernels)
    if quantization != "none" and target_device.type != "cpu":
        raise ModelNotSupported(f"--quantization {quantization} is only known on a CPU")
    on_cpu = target_device.type == "cpu"
    kernels = pick_kernels(cpu_kernels, served_dtype, quantization, allocate=allocate) if on_cpu else None
    register_attention()
    # Nothing is padded here, and a model that looks for padding waits for the device.
    config.get_text_config().pad_token_id = None
    module = _load_weights(folder, config, served_dtype, progress)
    module = module.to(target_device).eval().requires_grad_(False)
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    num_bytes = sum(parameter.nbytes for parameter in module.parameters())
    if target_device.type == "cuda":
        # cuDNN makes a plan for every number of keys, which takes 50 ms, and each decode step has a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    probed = probe_layers(module, config)
    body = find_body(module, config, probed)
    hidden_size = _hidden_size(module, config)
    context, lora = StepContext(), LoraContext()
    layers = tuple(layer.spec for layer in probed)
    attention = _pick_attention(kernels, layers, block_size, kv_cache_dtype)
    for index, layer in enumerate(probed):
        setattr(layer.module, LAYER_ATTRIBUTE, attention.layer(index, layer.spec, context))
    targets = find_targets(module)
    if kernels is not None:
        pack_linears(
            module,
            kernels.layouts,
            lambda fraction: progress("packing weights", fraction),
            head=None if targets.head is None else module.get_submodule(targets.targets[targets.head].path),
            head_layouts=kernels.head_layouts,
        )
        share_head(module, targets)
        if quantization != "none":
            num_bytes = _num_bytes(module)
        _leave_file(module, allocate)
    weights = ModelWeights(
        [module.get_submodule(target.path) for target in targets.targets], targets, target_device
    )
    wrap_targets(module, targets, lora)
    words = "torch's for CUDA" if kernels is None else kernels.words
    native, head = None if kernels is None else kernels.native, None
    longest = max_position(config)
    if native is not None and isinstance(attention, NativeAttention):
        step = SmallStep(context, attention, layers, block_size)
        decoder = fuse_layers(module, body, lora, native, step)
        if decoder is not None:
            words += ", all layers in one call"
            with step.running() as ids:
                head = plain_head(module, body, targets, ids)
            if head is not None:
                body = shorten_body(body, decoder, step, longest)
    text = config.get_text_config()
    return LoadedModel(
        module=module,
        body=body,
        head=head,
        layers=layers,
        targets=targets,
        weights=weights,
        lora=lora,
        context=context,
        attention=attention,
        vocab_size=int(text.vocab_size),
        hidden_size=hidden_size,
        max_position=longest,
        dtype=served_dtype,
        device=target_device,
        eos_token_ids=_eos_token_ids(folder, text),
        generation_defaults=_generation_defaults(folder),
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        family=str(config.model_type),
        native=native,
        kernels=words,
    )


def _pick_attention(
    kernels: CpuKernels | None, layers: Sequence[LayerSpec], block_size: int, kv_cache_dtype: CacheChoice
) -> AttentionKernels:
    """Raises ModelNotSupported if only torch could, and the cache is to have eight bits."""
    has_bytes = kv_cache_dtype == "int8"
    if kernels is not None and kernels.native and can_attend(layers, block_size):
        return NativeAttention(kernels.native, has_bytes=has_bytes)
    if not has_bytes:
        return TorchAttention()
    flag = f"--kv-cache-dtype {kv_cache_dtype} needs our own kernels on a CPU"
    if kernels is None or kernels.native is None:
        raise ModelNotSupported(
            flag + ("" if kernels is None else f", and linear layers are {kernels.words}")
        )
    raise ModelNotSupported(
        f"{flag}, and they do not know this attention (caps, sinks, or heads of other than a multiple of 16 "
        "dimensions up to 256) or this --block-size (other than a multiple of 16)"
    )


def _num_bytes(module: nn.Module) -> int:
    """Of all weights, packed ones as they lie."""
    packed = sum(layer.num_bytes for layer in module.modules() if isinstance(layer, PackedLinear))
    return packed + sum(parameter.nbytes for parameter in module.parameters())


def resolve_dtype(
    name: str, device: torch.device, config: Any, cpu_kernels: KernelChoice = "auto"
) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware or our own kernels compute in it with all weights; else float32.

    Raises ModelNotSupported.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ModelNotSupported(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if cpu_has("avx512_bf16") or cpu_has("amx_tile"):
        return torch.bfloat16
    is_ours = computes_bfloat16(cpu_kernels) and not _has_experts(config)
    return torch.bfloat16 if is_ours else torch.float32


def _has_experts(config: Any) -> bool:
    """In one large tensor, which torch computes with."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in _EXPERTS)


def load_config(folder: Path) -> Any:
    """The checkpoint's config, as transformers reads it. Raises ModelError."""
    if not folder.is_dir():
        raise ModelNotFound(f"there is no folder {folder}")
    raw = _read_json(folder / "config.json")
    if raw is None:
        raise ModelNotFound(f"{folder} is not a checkpoint: it has no config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        if "auto_map" in raw:
            raise ModelNotSupported(
                f"{raw.get('model_type')} needs code that comes with the checkpoint, which is never run"
            ) from error
        raise ModelNotSupported(
            f"transformers {transformers.__version__} does not know the model type {raw.get('model_type')!r}"
        ) from error


def _load_weights(folder: Path, config: Any, dtype: torch.dtype, progress: Progress) -> nn.Module:
    if not any(folder.glob("*.safetensors")):
        raise ModelNotFound(
            f"{folder} has no *.safetensors; other formats are not read, because they can run code"
        )
    progress("loading weights", 0.0)
    try:
        with quiet_transformers():
            module, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, ImportError, SafetensorError) as error:
        name = architecture_name(config)
        if ATTENTION_NAME in str(error):  # a table of its own with the attentions it knows: Falcon, GPT-J
            raise ModelNotSupported(
                f"{name} cannot be served: it does not use the attention interface of transformers"
            ) from error
        raise ModelInvalid(f"{name} cannot be loaded from {folder}: {_first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelInvalid(f"{folder} lacks {len(missing)} weights of the model, for instance {missing[0]}")
    progress("loading weights", 1.0)
    loaded: nn.Module = module
    return loaded


def _hidden_size(module: Any, config: Any) -> int:
    """By the output matrix, if there is one: some bodies project their hidden states before they return
    them.
    """
    matrix = module.get_output_embeddings()
    return int(config.get_text_config().hidden_size if matrix is None else matrix.weight.shape[1])


def _leave_file(module: nn.Module, allocate: Allocate) -> None:
    """Copy what is not packed out of the mapped file, one tensor at a time: a step must not wait for a disk,
    nor see a file that is replaced while the server runs."""
    for parameter in module.parameters():
        own = allocate(parameter.numel(), parameter.dtype).view(parameter.shape)
        parameter.data = own.copy_(parameter.data)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of its own on the terminal: the server shows one line."""
    logging = transformers.utils.logging
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _eos_token_ids(folder: Path, text_config: Any) -> frozenset[int]:
    """The generation config knows better than the config: chat models end turns with tokens of their own."""
    generation = _read_json(folder / "generation_config.json") or {}
    found = generation.get("eos_token_id", getattr(text_config, "eos_token_id", None))
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])


def _generation_defaults(folder: Path) -> SamplingDefaults:
    """Only what the file itself says: the library's own defaults are nobody's recommendation."""
    raw = _read_json(folder / "generation_config.json") or {}

    def number(key: str) -> float | None:
        value = raw.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    top_k = number("top_k")
    is_greedy = raw.get("do_sample") is False
    return SamplingDefaults(
        temperature=0.0 if is_greedy else number("temperature"),
        top_p=number("top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file; None if there is no file. Raises ModelInvalid."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelInvalid(f"{path} cannot be read as JSON") from error
    if not isinstance(parsed, dict):
        raise ModelInvalid(f"{path} does not hold a JSON object")
    return parsed


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
