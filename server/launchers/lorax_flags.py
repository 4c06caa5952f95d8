"""`lorax-launcher`, as LoRAX has it.

Its clients may take adapters from the hub unless it is told otherwise, and so may they here; with adapters
that are preloaded they get no others, as there.
"""

from server.launchers.flags import Ignored, Launcher, Refused, Taken, switched
from server.launchers.reading import read_adapters, read_gpu_share, read_sources
from server.launchers.shared_flags import SHARED

_NO_GRAPHS = "there are no graphs to record"
_IN_BYTES = "memory of adapters is counted in bytes: MOTET_ADAPTER_MEMORY_BYTES"
_ANY_HEADER = "every method is allowed, and so is every header; the x-… of answers can be read"
_NOT_SPECULATED = "nothing is speculated"
_AS_IT_IS = "one server has generation and embeddings, with vectors as long as the hidden states"

LORAX = Launcher(
    "lorax-launcher",
    (
        *SHARED,
        Refused(
            "source",
            "models are folders on this machine",
            "download it and give its folder with --model-id",
            ("hub", "local"),
        ),
        Refused("download-only", "nothing is downloaded", "leave it out", ("false",), is_switch=True),
        # Adapters
        Refused(
            "adapter-id",
            "requests that name no adapter get the base model",
            "load it with --preloaded-adapter-ids, and let requests name it",
            ("__base_model__",),
        ),
        Taken("default-adapter-source", ("adapter_sources",), read_sources),
        Taken("adapter-source", ("adapter_sources",), read_sources, default="hub"),
        Taken("preloaded-adapter-ids", ("lora_modules",), read_adapters, is_repeated=True),
        Ignored("preloaded-adapter-source", "what is preloaded is looked for on this machine"),
        switched("lorax-use-global-hf-token", "adapter_hub_own_token", has_flag=False),
        Ignored("predibase-api-token", "Predibase is no source of adapters here"),
        Ignored("merge-adapter-weights", "adapters are never folded into the base", is_switch=True),
        Ignored("max-active-adapters", _IN_BYTES),
        Ignored("adapter-memory-fraction", _IN_BYTES),
        Ignored("adapter-cycle-time-s", "who was served least comes first, see MOTET_FAIR_BY"),
        # Steps
        switched("prefix-caching", "enable_prefix_caching"),
        Ignored("chunked-prefill", "prompts are always computed in pieces", is_switch=True),
        Ignored("eager-prefill", "a request joins the running ones in the next step", is_switch=True),
        Refused("speculative-tokens", _NOT_SPECULATED, "leave it out, or say 0", ("0",)),
        Ignored("speculation-max-batch-size", _NOT_SPECULATED),
        # The machine
        Taken("memory-wiggle-room", ("gpu_memory_utilization",), read_gpu_share),
        Ignored("compile", _NO_GRAPHS, is_switch=True),
        Ignored("eager", _NO_GRAPHS, is_switch=True),
        Ignored("compile-max-batch-size", _NO_GRAPHS),
        Ignored("compile-max-rank", _NO_GRAPHS),
        Ignored("compile-batch-size", _NO_GRAPHS),
        Ignored("backend", "the kernels are others"),
        Ignored("disable-sgmv", "the kernels are others", is_switch=True),
        # Web pages, other kinds of models, logs
        Ignored("cors-allow-header", _ANY_HEADER, is_repeated=True),
        Ignored("cors-allow-method", _ANY_HEADER, is_repeated=True),
        Ignored("cors-expose-header", _ANY_HEADER, is_repeated=True),
        Refused(
            "cors-allow-credentials",
            "answers are never for a page's cookies",
            "leave it out, and let pages send the key as a header",
            ("false",),
            is_switch=True,
        ),
        Refused("embedding-model", _AS_IT_IS, "leave it out", ("false",), is_switch=True),
        Refused("embedding-dim", _AS_IT_IS, "leave it out"),
        Ignored("request-logger-url", "prompts and answers are sent to nobody", has_flag=False),
    ),
)
