"""Numbers about the service, in the text format of Prometheus. The only importer of prometheus-client.

The event loop counts into plain integers and lists, which costs a fraction of a microsecond; metric
families are made from them when somebody scrapes. So no label set can go stale: what is not true any more
is not written any more.

Names with the prefix `vllm:` are those that routers and autoscalers read, with the meaning they have there
(labels `model_name` and `engine`); `motet_` is for what only this server has. Adapter names are labels of
counters only up to a cap, after which new ones share the label "other".
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from adapters.types import AdapterInfo, AdapterRef, Clock
from server.engine.plan import StepStats
from server.engine.sequence import WaitReason
from server.types import FinishReason, Timing

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BASE_LABEL = "__base_model__"
_OTHER_LABEL = "other"
_Value = tuple[dict[str, str], float]
"""Labels beside the common ones, and the number."""
_CAPACITY_REASONS = frozenset({WaitReason.CAPACITY, WaitReason.BLOCKS})

_TOKEN_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.035,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 65536.0)
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One finished request, all its choices together."""

    request_id: str
    adapter: str | None  # None = the base model
    reason: FinishReason
    n: int
    max_tokens: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    timing: Timing


class _Histogram:
    """Counts per bucket; (bounds[i-1], bounds[i]] is bucket i, the last one is open."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        names = [*(repr(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, accumulate(map(float, self.counts)), strict=True))


class _Use:
    """What one adapter label has used."""

    __slots__ = ("generated_tokens", "prompt_tokens", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0


@dataclass(slots=True)
class _Counts:
    """Everything that only grows."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    reader_pauses: int = 0


_COUNTERS = (
    ("vllm:prompt_tokens", "Prompt tokens of requests that got their first token.", "prompt_tokens"),
    ("vllm:prompt_tokens_cached", "Of those, taken from the prefix cache.", "cached_tokens"),
    ("vllm:generation_tokens", "Tokens generated.", "generated_tokens"),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits"),
    ("vllm:gpu_prefix_cache_queries", "Older name of prefix_cache_queries.", "prefix_queries"),
    ("vllm:gpu_prefix_cache_hits", "Older name of prefix_cache_hits.", "prefix_hits"),
    ("vllm:num_preemptions", "Sequences that gave their KV blocks up and were recomputed.", "preemptions"),
)
_OWN_COUNTERS = (
    ("motet_adapter_loads", "Adapters made resident on the device.", "adapter_loads"),
    ("motet_adapter_evictions", "Adapters that left the device's memory.", "adapter_evictions"),
    ("motet_reader_pauses", "Streams paused because their client did not read.", "reader_pauses"),
)


class _Histograms:
    """Where the time and the tokens went."""

    def __init__(self) -> None:
        self.first_token = _Histogram(_FIRST_TOKEN_SECONDS)
        self.gap = _Histogram(_TOKEN_SECONDS)
        self.per_output_token = _Histogram(_TOKEN_SECONDS)
        self.total = _Histogram(_REQUEST_SECONDS)
        self.queue = _Histogram(_REQUEST_SECONDS)
        self.inference = _Histogram(_REQUEST_SECONDS)
        self.prefill = _Histogram(_REQUEST_SECONDS)
        self.decode = _Histogram(_REQUEST_SECONDS)
        self.prompt_tokens = _Histogram(_TOKENS)
        self.generated_tokens = _Histogram(_TOKENS)
        self.max_tokens = _Histogram(_TOKENS)
        self.choices = _Histogram(_CHOICES)
        self.step_tokens = _Histogram(_TOKENS)
        self.adapter_load = _Histogram(_REQUEST_SECONDS)
        self.step = _Histogram(_STEP_SECONDS)


_HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "Arrival to first token.", "first_token"),
    ("vllm:inter_token_latency_seconds", "Between two tokens of a choice.", "gap"),
    ("vllm:request_time_per_output_token_seconds", "Mean of a request's gaps.", "per_output_token"),
    ("vllm:e2e_request_latency_seconds", "Arrival to last token.", "total"),
    ("vllm:request_queue_time_seconds", "Hand-over to the engine until first scheduled.", "queue"),
    ("vllm:request_inference_time_seconds", "First scheduled to last token.", "inference"),
    ("vllm:request_prefill_time_seconds", "First scheduled to first token.", "prefill"),
    ("vllm:request_decode_time_seconds", "First to last token.", "decode"),
    ("vllm:request_prompt_tokens", "Prompt tokens of a request.", "prompt_tokens"),
    ("vllm:request_generation_tokens", "Generated tokens of a request.", "generated_tokens"),
    ("vllm:request_params_max_tokens", "max_tokens of a request.", "max_tokens"),
    ("vllm:request_params_n", "Choices of a request.", "choices"),
    ("vllm:iteration_tokens_total", "Tokens computed in a step.", "step_tokens"),
    ("vllm:lora_adapter_load_seconds", "Reading and checking an adapter.", "adapter_load"),
)


class Metrics(Collector):
    """Counted and rendered on the event loop; not thread-safe."""

    def __init__(
        self,
        model_name: str,
        *,
        block_size: int,
        max_lora: int,
        is_accelerated: bool,
        adapters: Callable[[], Iterable[AdapterInfo]] = tuple,
        in_host_memory: Callable[[AdapterRef], bool] = lambda ref: True,
        max_adapter_labels: int = 100,
        unix_time: Clock = time.time,
    ) -> None:
        """`max_lora`: distinct adapters in one batch at most. `adapters`: the registered ones, at a scrape.
        `is_accelerated`: adapters are resident in the memory of a GPU, not in the host's."""
        self._labels = {"model_name": model_name, "engine": "0"}
        self._block_size = block_size
        self._max_lora = max_lora
        self._is_accelerated = is_accelerated
        self._adapters = adapters
        self._in_host_memory = in_host_memory
        self._max_adapter_labels = max_adapter_labels
        self._unix_time = unix_time
        self._level: StepStats | None = None
        self._counts = _Counts()
        self._histograms = _Histograms()
        self._finished = dict.fromkeys(FinishReason, 0)
        self._refused: dict[str, int] = {}
        self._used_by: dict[str, _Use] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    # --- Counting -----------------------------------------------------------------------------------------

    def observe_step(self, stats: StepStats, num_generated: int) -> None:
        counts, level = self._counts, self._level
        counts.generated_tokens += num_generated
        counts.prefix_queries += stats.prefix_queries
        counts.prefix_hits += stats.prefix_hits
        counts.preemptions += stats.preemptions
        self._histograms.step.observe(stats.step_s)
        self._histograms.step_tokens.observe(stats.prefill_tokens + stats.decode_tokens)
        before = () if level is None else level.adapters_resident
        if stats.adapters_resident != before:
            counts.adapter_loads += len(set(stats.adapters_resident).difference(before))
            counts.adapter_evictions += len(set(before).difference(stats.adapters_resident))
        self._level = stats

    def observe_first_token(self, seconds: float) -> None:
        """Once per prompt of a request that generates."""
        self._histograms.first_token.observe(seconds)

    def observe_prompt(self, num_prompt: int, num_cached: int) -> None:
        """Once per prompt of a request, when the first answer to it is there."""
        self._counts.prompt_tokens += num_prompt
        self._counts.cached_tokens += num_cached

    def observe_gap(self, seconds: float) -> None:
        """Between two tokens of a choice."""
        self._histograms.gap.observe(seconds)

    def observe_request(self, stats: RequestStats) -> None:
        """Once per accepted request, when it is over."""
        self._finished[stats.reason] += 1
        use = self._use_of(_BASE_LABEL if stats.adapter is None else stats.adapter)
        use.requests += 1
        use.prompt_tokens += stats.prompt_tokens
        use.generated_tokens += stats.generated_tokens
        histograms, timing = self._histograms, stats.timing
        histograms.prompt_tokens.observe(stats.prompt_tokens)
        histograms.generated_tokens.observe(stats.generated_tokens)
        histograms.max_tokens.observe(stats.max_tokens)
        histograms.choices.observe(stats.n)
        histograms.queue.observe(timing.queue_s)
        if not stats.generated_tokens:
            return  # it never got far enough for the others to mean anything
        decode_s = timing.last_token - timing.first_token
        histograms.total.observe(timing.total_s)
        histograms.inference.observe(timing.last_token - timing.started)
        histograms.prefill.observe(timing.first_token - timing.started)
        histograms.decode.observe(decode_s)
        if (num_gaps := stats.generated_tokens // stats.n - 1) > 0:
            histograms.per_output_token.observe(decode_s / num_gaps)

    def observe_refusal(self, reason: str) -> None:
        """A request that was not accepted; `reason` is one of a few fixed words."""
        self._refused[reason] = self._refused.get(reason, 0) + 1

    def observe_reader_pause(self) -> None:
        self._counts.reader_pauses += 1

    def observe_adapter_load(self, seconds: float) -> None:
        """Files read, checked and converted into host memory."""
        self._histograms.adapter_load.observe(seconds)

    def _use_of(self, label: str) -> "_Use":
        use = self._used_by.get(label)
        if use is None:
            if len(self._used_by) >= self._max_adapter_labels:
                label = _OTHER_LABEL
            use = self._used_by.setdefault(label, _Use())
        return use

    # --- Rendering ----------------------------------------------------------------------------------------

    def render(self) -> bytes:
        """All metrics in the text format of Prometheus; see CONTENT_TYPE."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._collect_levels()
        for name, text, field in _COUNTERS:
            yield self._counter(name, text, [({}, getattr(self._counts, field))])
        for name, text, field in _OWN_COUNTERS:
            yield self._counter(name, text, [({}, getattr(self._counts, field))])
        finished = [({"finished_reason": str(reason)}, count) for reason, count in self._finished.items()]
        yield self._counter("vllm:request_success", "Requests that are over, by reason.", finished)
        refused = [({"reason": reason}, count) for reason, count in self._refused.items()]
        yield self._counter("vllm:admission_rejections", "Requests that were not accepted.", refused)
        for name, text, field in _HISTOGRAMS:
            yield self._histogram(name, text, getattr(self._histograms, field))
        yield self._histogram("motet_step_seconds", "Time of an engine step.", self._histograms.step)
        yield from self._collect_adapters()

    def _collect_levels(self) -> Iterator[Metric]:
        level = self._level
        waiting_by = {} if level is None else dict(level.waiting_by)
        num_short = sum(n for reason, n in waiting_by.items() if reason in _CAPACITY_REASONS)
        by_reason = [
            ({"reason": "capacity"}, num_short),
            ({"reason": "deferred"}, sum(waiting_by.values()) - num_short),
        ]
        use = level.blocks_used / level.blocks_total if level is not None and level.blocks_total else 0.0
        hits, queries = self._counts.prefix_hits, self._counts.prefix_queries
        hit_rate = hits / queries if queries else 0.0
        cache = {
            "block_size": str(self._block_size),
            "num_gpu_blocks": str(level.blocks_total if level else 0),
        }
        for name, text, values in (
            ("vllm:num_requests_running", "Sequences in the batch.", [({}, level.running if level else 0)]),
            (
                "vllm:num_requests_waiting",
                "Sequences not in the batch.",
                [({}, level.waiting if level else 0)],
            ),
            ("vllm:num_requests_waiting_by_reason", "For room, or for something of their own.", by_reason),
            ("vllm:kv_cache_usage_perc", "KV blocks in use, 0 to 1.", [({}, use)]),
            ("vllm:gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", [({}, use)]),
            ("vllm:gpu_prefix_cache_hit_rate", "Hits by queries since the start.", [({}, hit_rate)]),
            ("vllm:cache_config_info", "Sizes of the KV cache.", [(cache, 1)]),
        ):
            yield self._gauge(name, text, values)

    def _collect_adapters(self) -> Iterator[Metric]:
        level = self._level
        info = {
            "max_lora": str(self._max_lora),
            "running_lora_adapters": _names(level.adapters_running if level else ()),
            "waiting_lora_adapters": _names(level.adapters_waiting if level else ()),
        }
        yield self._gauge("vllm:lora_requests_info", "When this was true.", [(info, self._unix_time())])
        loaded = list(self._loaded())
        num_gpu = sum(labels["level"] == "gpu" for labels, _ in loaded)
        yield self._gauge("vllm:lora_adapter_loaded", "Which adapter is in which memory.", loaded)
        yield self._gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters on the GPU.", [({}, num_gpu)])
        num_cpu = len(loaded) - num_gpu
        yield self._gauge("vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory.", [({}, num_cpu)])
        yield self._gauge("vllm:max_gpu_lora_adapters", "In one batch at most.", [({}, self._max_lora)])
        for field in _Use.__slots__:
            values = [({"adapter": label}, getattr(use, field)) for label, use in self._used_by.items()]
            yield self._counter(f"motet_adapter_{field}", f"Finished requests: {field} by adapter.", values)

    def _loaded(self) -> Iterator[_Value]:
        resident = set(self._level.adapters_resident) if self._level is not None else set()
        for adapter in self._adapters():
            labels = {"adapter_name": adapter.ref.name, "pinned": "false", "rank": str(adapter.rank)}
            if self._is_accelerated and adapter.ref in resident:
                yield {**labels, "level": "gpu"}, 1
            if self._in_host_memory(adapter.ref):
                yield {**labels, "level": "cpu"}, 1

    def _gauge(self, name: str, text: str, values: Iterable[_Value]) -> Metric:
        return self._filled(GaugeMetricFamily(name, text), values)

    def _counter(self, name: str, text: str, values: Iterable[_Value]) -> Metric:
        return self._filled(CounterMetricFamily(name, text), values, suffix="_total")

    def _filled(self, family: Metric, values: Iterable[_Value], *, suffix: str = "") -> Metric:
        for labels, value in values:
            family.add_sample(family.name + suffix, {**self._labels, **labels}, value)
        return family

    def _histogram(self, name: str, text: str, histogram: _Histogram) -> Metric:
        family = HistogramMetricFamily(name, text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), histogram.buckets(), histogram.total)
        return family


def _names(refs: Iterable[AdapterRef]) -> str:
    """A list in one label; a comma in a name must not look like two adapters."""
    return ",".join(sorted(ref.name.replace(",", "%2C") for ref in refs))
