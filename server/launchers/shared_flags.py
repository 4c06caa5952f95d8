"""The flags that TGI's launcher and LoRAX's have in common; LoRAX began as a copy of TGI."""

from server.launchers.flags import Beside, Flag, Ignored, Refused, Taken, renamed
from server.launchers.reading import (
    is_address,
    read_gpu_share,
    read_log_level,
    read_model,
    read_origins,
    read_seats,
)

_ANY_ADDRESS = "0.0.0.0"  # noqa: S104  as in a container, which publishes the ports it means to
_ONE_PROCESS = "one process computes, on one device"
_ONE_EACH = "start one on each device, and balance requests among them"
_AT_ONCE = "a request joins the running ones in the next step"
_FIXED = "this limit of a request is fixed; /info shows it"
_NO_TUNNEL = "no tunnel is opened"
_NO_TRACES = "no traces are sent; see /metrics"
_NO_WATERMARK = "there are no watermarks: a request that asks for one is refused"

SHARED: tuple[Flag, ...] = (
    # The model
    Taken("model-id", ("model", "served_model_name"), read_model),
    Beside("revision", "model-id"),
    Beside("huggingface-hub-cache", "model-id"),
    Refused(
        "weights-cache-override",
        "the weights are those of the model's folder",
        "give the folder that has config and weights with --model-id",
    ),
    Refused(
        "tokenizer-config-path",
        "tokenizer and chat template are those of the model's folder",
        "put the file there, as tokenizer_config.json",
    ),
    Refused(
        "trust-remote-code",
        "no code that comes with a model is ever run",
        "take a model that transformers knows by itself",
        ("false",),
        is_switch=True,
    ),
    renamed("dtype", "dtype"),
    Refused(
        "quantize",
        "this kind of quantization is not computed here",
        "take the model as it was before, with MOTET_QUANTIZATION=int8 or int4 if it runs on a CPU",
    ),
    # Where to listen, and to whom
    renamed("hostname", "host", default=_ANY_ADDRESS, counts=is_address),
    renamed("port", "port", letter="p", default="80"),
    Taken("cors-allow-origin", ("allowed_origins",), read_origins, is_repeated=True),
    Refused("ngrok", _NO_TUNNEL, "put a proxy in front of the port", ("false",), is_switch=True),
    Ignored("ngrok-authtoken", _NO_TUNNEL),
    Ignored("ngrok-edge", _NO_TUNNEL),
    # How much
    renamed("max-total-tokens", "max_model_len"),
    Ignored("max-input-length", "a prompt may have what --max-total-tokens leaves"),
    Taken("max-concurrent-requests", ("max_num_seqs", "max_queued_requests"), read_seats),
    Ignored(
        "max-batch-total-tokens",
        "the KV cache takes the memory that is left, or MOTET_KV_CACHE_MEMORY_BYTES",
    ),
    Ignored(
        "max-batch-prefill-tokens",
        "prompts are computed in pieces that suit the device, or MOTET_MAX_NUM_BATCHED_TOKENS",
    ),
    Ignored("waiting-served-ratio", _AT_ONCE),
    Ignored("max-waiting-tokens", _AT_ONCE),
    Ignored("max-best-of", _FIXED),
    Ignored("max-stop-sequences", _FIXED),
    Ignored("validation-workers", "prompts are read by a pool of its own size"),
    # The machine
    Taken("cuda-memory-fraction", ("gpu_memory_utilization",), read_gpu_share),
    Refused("sharded", _ONE_PROCESS, _ONE_EACH, ("false",), is_switch=True),
    Refused("num-shard", _ONE_PROCESS, _ONE_EACH, ("1",)),
    Ignored("shard-uds-path", _ONE_PROCESS),
    Ignored("master-addr", _ONE_PROCESS),
    Ignored("master-port", _ONE_PROCESS),
    Ignored(
        "disable-custom-kernels",
        "the kernels are others: MOTET_CPU_KERNELS chooses among them",
        is_switch=True,
    ),
    # What it says of itself
    Taken("log-level", ("log_level",), read_log_level, has_flag=False),
    Ignored("json-output", "the log is lines of text", is_switch=True),
    Ignored("otlp-endpoint", _NO_TRACES),
    Ignored(
        "env",
        "the line that says the server is ready tells what there is",
        letter="e",
        is_switch=True,
        has_variable=False,
    ),
    Ignored("watermark-gamma", _NO_WATERMARK),
    Ignored("watermark-delta", _NO_WATERMARK),
)
