"""`text-generation-launcher`, as of TGI 3."""

from server.launchers.flags import Ignored, Launcher, Refused, Taken, renamed, switched
from server.launchers.reading import read_adapters, read_seats
from server.launchers.shared_flags import SHARED

_AS_TRAINED = "positions are those of the model's config"
_CHANGE_CONFIG = "set rope_parameters in its config.json"

TGI = Launcher(
    "text-generation-launcher",
    (
        *SHARED,
        Taken("lora-adapters", ("lora_modules",), read_adapters),
        renamed("api-key", "api_key"),
        Taken("max-batch-size", ("max_num_seqs",), read_seats),
        Ignored("max-input-tokens", "a prompt may have what --max-total-tokens leaves"),
        Ignored("max-client-batch-size", "a request may have as many inputs as may run and wait"),
        Ignored("max-top-n-tokens", "this limit of a request is fixed"),
        Ignored("payload-limit", "this limit of a request is fixed"),
        Ignored("enable-prefill-logprobs", "every request may ask for them", is_switch=True),
        Refused(
            "disable-grammar-support",
            "there are no grammars: a request that brings one is refused",
            "leave it out, or say true",
            ("true",),
            is_switch=True,
        ),
        Refused("speculate", "nothing is speculated", "leave it out, or say 0", ("0",)),
        Refused(
            "kv-cache-dtype",
            "there is no fp8 here",
            "leave it out, or set MOTET_KV_CACHE_DTYPE=int8 on a CPU",
        ),
        Refused("rope-scaling", _AS_TRAINED, _CHANGE_CONFIG),
        Refused("rope-factor", _AS_TRAINED, _CHANGE_CONFIG),
        switched("prefix-caching", "enable_prefix_caching", has_flag=False),
        renamed("graceful-termination-timeout", "drain_timeout"),
        Ignored("cuda-graphs", "there are no graphs to record"),
        Ignored("otlp-service-name", "no traces are sent; see /metrics"),
        Ignored("prometheus-port", "/metrics is on the server's own port"),
        Ignored("usage-stats", "nothing is told to anybody"),
    ),
)
