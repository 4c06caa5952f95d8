"""Build the heavy half of a server: model, memory, engine.

Imports torch and transformers, some seconds of work, and is therefore itself imported by `server.app` in the
loading thread, while `/health` already answers. Nothing here runs on the event loop; what comes out is plain
to wire.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from adapters.device import make_arena
from adapters.errors import AdapterError
from adapters.host_memory import Allocate, memory_for
from adapters.merge import merge_weights
from adapters.placement import AdapterPlacement
from adapters.reader import AdapterFiles
from adapters.registry import AdapterRegistry
from adapters.scan import AdaptersFolder
from adapters.sources.local import LocalSource
from adapters.sources.remote import RemoteSource
from adapters.store import AdapterStore
from adapters.types import AdapterRef, Revision, TargetKind
from adapters.watch import AdapterWatch
from adapters.weights import LoraWeights, load_weights, read_outline
from server import __version__
from server.embedded.location import NAME, model_dir
from server.engine.blocks import BlockPool
from server.engine.card import ModelCard
from server.engine.core import EngineCore
from server.engine.fair_queue import Prices
from server.engine.kv_cache import KVCache, kv_bytes_per_block, num_kv_blocks
from server.engine.leases import Merge
from server.engine.model_runner import ModelRunner
from server.engine.plan import Forget, Pins
from server.engine.prompt_reader import SLICE_NUMBERS
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.worker import EngineWorker
from server.model.cpu_kernels import native_instructions
from server.model.errors import MemoryTooSmall, ModelError
from server.model.loader import LoadedModel, load_model
from server.model.memory import available_cpu_bytes, default_kv_bytes
from server.progress import StartProgress, in_units
from server.remotes import make_local, make_remotes
from server.settings import Settings
from server.text.adapter_text import AdapterTexts
from server.text.tokenizer import Tokenizer
from server.threads import NUM_LOADERS, Threads

_EMBEDDED_NAMES = ("motet", NAME)
_CROWD_TOKENS: dict[str, int | None] = {"cpu": 16, "cuda": None}  # see server/engine/company.py
_STEP_TOKENS = {"cpu": 512, "cuda": 8192}  # see --max-num-batched-tokens
_ADAPTER_SHARE = 16  # of the memory that is left on CPU, of all of it on a GPU: adapters by default
_ADAPTER_LIMIT_BYTES = 1 << 30
_HOST_SHARE = 8
_WIDEST_AT_ONCE = (
    4  # activations of the widest layer that live at the same time: gate, up, their product, a cast
)
_LOGITS_AT_ONCE = 3  # float32 logits, sorted ones, probabilities
_HOST_LIMIT_BYTES = 4 << 30

# A product that one core does in less time than it takes to meet the others is not worth a meeting, and a
# meeting with a core that somebody else uses takes milliseconds. The embedded model (15 MB, two cores of a
# Zen 4): 1 user 240 to 260 tokens/s on one thread, 126 to 198 on two beside other work; 8 users alike.
_SMALL_MODEL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Assembly:
    """The parts that the event loop needs, not yet started."""

    card: ModelCard
    tokenizer: Tokenizer
    registry: AdapterRegistry
    watch: AdapterWatch | None  # of the adapters folder, if there is one
    texts: AdapterTexts | None  # None: all adapters read and write as the base does
    worker: EngineWorker
    num_parameters: int
    num_blocks: int
    kv_bytes: int
    adapter_bytes: int
    remotes: dict[str, RemoteSource]
    num_threads: int
    kernels: str  # in words
    check_adapter: Callable[[Path], Revision]  # reads a folder as a load does; raises AdapterError
    merge: Merge


@dataclass(frozen=True, slots=True)
class AdapterObserver:
    """Told on the event loop what becomes of adapters' files."""

    on_loaded: Callable[[str, float], None]  # name, seconds
    on_failed: Callable[[AdapterError], None]


def assemble(
    settings: Settings,
    progress: StartProgress,
    threads: Threads,
    observer: AdapterObserver,
    allocate: Allocate,
) -> Assembly:
    """Load the model and build an engine around it. Runs on the engine's thread. `allocate` makes the memory
    of weights on a CPU.

    Raises ModelError with a message for the operator.
    """
    local, remotes = make_local(settings), make_remotes(settings)
    _compute_alone(threads.loaders)
    torch.set_num_threads(settings.threads or _num_cores())
    folder = Path(settings.model) if settings.model else model_dir()
    dtype = "float32" if settings.model is None and settings.dtype == "auto" else settings.dtype
    model = load_model(
        folder,
        dtype=dtype,
        device=_device(settings.device),
        progress=progress,
        cpu_kernels=settings.cpu_kernels,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        block_size=settings.block_size,
        allocate=allocate,
    )
    if settings.threads is None and model.num_bytes < _SMALL_MODEL_BYTES:
        torch.set_num_threads(1)
    try:
        tokenizer = Tokenizer.load(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {folder} cannot be loaded: {error}") from error
    adapter_bytes = settings.adapter_memory_bytes or _default_adapter_bytes(model)
    kv, max_model_len = _make_kv_cache(settings, model, adapter_bytes, progress)
    card = _card(settings, folder, model, max_model_len, kv.num_blocks * kv.block_size)
    store = _make_store(settings, threads)
    texts = _make_texts(settings, folder, model, tokenizer)
    host_memory = memory_for(model.device)
    files = _adapter_files(model, adapter_bytes, texts, host_memory)
    worker = _make_engine(settings, model, kv, store, adapter_bytes, max_model_len, threads.engine)
    registry = AdapterRegistry(
        store,
        local,
        files,
        threads.pool,
        threads.loaders,
        askers=threads.askers,
        fetchers=threads.fetchers,
        remotes=remotes,
        reserved=card.base_names,
        on_pins=lambda refs: worker.put(Pins.of(refs)),
        on_loaded=observer.on_loaded,
        on_failed=observer.on_failed,
    )
    store.on_discarded = lambda revision: worker.put(Forget(revision))
    return Assembly(
        card=card,
        tokenizer=tokenizer,
        registry=registry,
        watch=_make_watch(settings, local, registry, threads),
        texts=texts,
        worker=worker,
        num_parameters=model.num_parameters,
        num_blocks=kv.num_blocks,
        kv_bytes=kv.num_bytes,
        adapter_bytes=adapter_bytes,
        remotes=remotes,
        num_threads=torch.get_num_threads(),
        kernels=model.kernels,
        check_adapter=lambda folder: _revision_of(folder, files),
        merge=partial(merge_weights, targets=model.targets, max_bytes=adapter_bytes, allocate=host_memory),
    )


def _num_cores() -> int:
    """The cores that this process may use, where the system says so."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _compute_alone(loaders: Executor) -> None:
    """Let each loader compute on one thread, its own: the others belong to the engine.

    torch keeps the number per thread, and gives the newest one to threads that are made later: therefore all
    loaders are made now, before the engine sets its own.
    """
    meeting = threading.Barrier(NUM_LOADERS)

    def settle() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # torch asks for the newest number at a thread's first use: let that be now
        meeting.wait()  # nobody takes a second turn before everybody had one

    for settled in [loaders.submit(settle) for _ in range(NUM_LOADERS)]:
        settled.result()


def _device(wanted: str) -> str:
    """Raises ModelError for a device that is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = wanted.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not count or not (number == "" or (number.isdecimal() and int(number) < count)):
        raise ModelError(f"--device {wanted}: there is no such device (choose auto, cpu, cuda or cuda:N)")
    return wanted


def _make_kv_cache(
    settings: Settings, model: LoadedModel, adapter_bytes: int, progress: StartProgress
) -> tuple[KVCache, int]:
    """The cache, and the longest sequence that is served.

    A length that the operator asked for must fit; without one, the model's own is lowered to what fits.
    """
    if settings.max_model_len and settings.max_model_len > model.max_position:
        raise ModelError(
            f"--max-model-len {settings.max_model_len}: the model knows only {model.max_position} positions"
        )
    budget = settings.kv_cache_memory_bytes or _default_kv_bytes(settings, model, adapter_bytes)
    per_block = kv_bytes_per_block(model.layers, model.attention, settings.block_size, model.dtype)
    longest = settings.max_model_len or min(model.max_position, budget // per_block * settings.block_size)
    if longest < 1:
        raise MemoryTooSmall(
            f"--kv-cache-memory-bytes {in_units(budget)} does not hold one block of {in_units(per_block)}"
        )
    num_blocks = num_kv_blocks(
        budget, per_block, settings.block_size, max_model_len=longest, max_num_seqs=settings.max_num_seqs
    )
    kv = KVCache(
        model.layers,
        model.attention,
        num_blocks=num_blocks,
        block_size=settings.block_size,
        dtype=model.dtype,
        device=model.device,
    )
    progress.note(
        "KV cache", f"{num_blocks} blocks of {settings.block_size} tokens, {in_units(kv.num_bytes)}"
    )
    if longest < model.max_position and not settings.max_model_len:
        progress.note(
            "context", f"{longest} of the model's {model.max_position} tokens: more needs more KV memory"
        )
    return kv, longest


def _default_kv_bytes(settings: Settings, model: LoadedModel, adapter_bytes: int) -> int:
    """On a GPU the arena and a step's activations come out of the same share of the device."""
    budget = default_kv_bytes(model.device, gpu_memory_utilization=settings.gpu_memory_utilization)
    if model.device.type == "cpu":
        return budget
    linears = [target for target in model.targets.targets if target.kind is TargetKind.LINEAR]
    widest = max(target.out_features for target in linears)
    step_tokens = settings.max_num_batched_tokens or _STEP_TOKENS[model.device.type]
    step_bytes = _WIDEST_AT_ONCE * step_tokens * widest * model.dtype.itemsize
    sampled, scored = settings.max_num_seqs * model.vocab_size, step_tokens * model.vocab_size
    logits_bytes = _LOGITS_AT_ONCE * max(sampled, min(scored, SLICE_NUMBERS)) * 4
    return max(0, budget - adapter_bytes - step_bytes - logits_bytes)


def _default_adapter_bytes(model: LoadedModel) -> int:
    if model.device.type == "cuda":
        return torch.cuda.mem_get_info(model.device)[1] // _ADAPTER_SHARE
    return min(_ADAPTER_LIMIT_BYTES, available_cpu_bytes() // _ADAPTER_SHARE)


def _make_store(settings: Settings, threads: Threads) -> AdapterStore[LoraWeights]:
    host_bytes = settings.adapter_host_memory_bytes or min(
        _HOST_LIMIT_BYTES, available_cpu_bytes() // _HOST_SHARE
    )
    return AdapterStore(threads.loaders, host_bytes, max_reading=NUM_LOADERS)


def _make_texts(
    settings: Settings, folder: Path, model: LoadedModel, tokenizer: Tokenizer
) -> AdapterTexts | None:
    if settings.adapter_text == "base":
        return None
    return AdapterTexts(tokenizer, folder, num_embeddings=model.vocab_size, eos_token_ids=model.eos_token_ids)


def _adapter_files(
    model: LoadedModel, adapter_bytes: int, texts: AdapterTexts | None, allocate: Allocate
) -> AdapterFiles[LoraWeights]:
    return AdapterFiles(
        read_extras=(lambda folder: None) if texts is None else texts.read,
        outline=lambda folder: read_outline(folder, model.targets, model.dtype, adapter_bytes),
        load=lambda folder: load_weights(
            folder, model.targets, model.dtype, adapter_bytes, model.weights, allocate=allocate
        ),
    )


def _revision_of(folder: Path, files: AdapterFiles[LoraWeights]) -> Revision:
    """Reads all that a load reads. Raises AdapterError."""
    weights = files.load(folder)
    files.read_extras(folder)
    return weights.revision


def _make_watch(
    settings: Settings, source: LocalSource, registry: AdapterRegistry, threads: Threads
) -> AdapterWatch | None:
    if settings.adapters_dir is None:
        return None
    folder = AdaptersFolder(settings.adapters_dir, source, registry, threads.pool)
    return AdapterWatch(folder, threads.watcher)


def _make_engine(
    settings: Settings,
    model: LoadedModel,
    kv: KVCache,
    store: AdapterStore[LoraWeights],
    adapter_bytes: int,
    max_model_len: int,
    thread: Executor,
) -> EngineWorker:
    native = native_instructions(settings.cpu_kernels)
    arena = make_arena(model.device, adapter_bytes, model.dtype, native=native)
    runner = ModelRunner(model, kv, arena, store.get)

    def num_bytes(ref: AdapterRef) -> int:
        return store.get(ref.revision).num_bytes

    scheduler = Scheduler(
        BlockPool(kv.num_blocks, kv.block_size, settings.enable_prefix_caching),
        AdapterPlacement(adapter_bytes),
        num_bytes,
        SchedulerLimits(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens or _STEP_TOKENS[model.device.type],
            prefetches=model.device.type == "cuda",
            prices=Prices(settings.fair_prefill_price, settings.fair_decode_price),
            crowd_tokens=_CROWD_TOKENS[model.device.type],
        ),
        time.monotonic,
    )
    core = EngineCore(scheduler, runner, time.monotonic, model.eos_token_ids, max_model_len)
    return EngineWorker(core, thread)


def _default_names(settings: Settings, folder: Path) -> tuple[str, ...]:
    """The path as the operator gave it, as in vLLM, and the folder's own name."""
    if settings.model is None:
        return _EMBEDDED_NAMES
    return tuple(dict.fromkeys((settings.model, folder.resolve().name)))


def _card(
    settings: Settings, folder: Path, model: LoadedModel, max_model_len: int, kv_tokens: int
) -> ModelCard:
    names = settings.served_model_name or _default_names(settings, folder)
    dtype = str(model.dtype).removeprefix("torch.")
    config = (folder / "config.json").read_bytes()
    makers = f"{__version__} {torch.__version__} {dtype} {model.device} {model.kernels} {names[0]}"
    return ModelCard(
        id=names[0],
        served_names=names,
        max_model_len=max_model_len,
        kv_tokens=kv_tokens,
        created=int(time.time()),
        dtype=dtype,
        device=str(model.device),
        compute_type="gpu" if model.device.type == "cuda" else "cpu",
        fingerprint=f"motet-{hashlib.sha256(makers.encode() + config).hexdigest()[:12]}",
        vocab_size=model.vocab_size,
        family=model.family,
        num_parameters=model.num_parameters,
        num_bytes=model.num_bytes,
        num_layers=len(model.layers),
        eos_token_ids=model.eos_token_ids,
        generation_defaults=model.generation_defaults,
        hidden_size=model.hidden_size,
        quantization=settings.quantization,
    )
