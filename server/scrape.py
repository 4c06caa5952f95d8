"""From what was counted to the text format of Prometheus. The only importer of prometheus-client.

A `Snapshot` holds everything that a scrape says, as it was at one moment. Writing it takes some tens of
milliseconds with many adapters, so it is done in whatever thread is free, while the event loop counts on.
Families are made anew for each scrape: what is not true any more is not written any more.

Histograms of requests keep an id for each bucket, which OpenMetrics calls an exemplar: a point on a dashboard
leads to a request in the logs.

Names with the prefix `vllm:` are those that routers and autoscalers read, with the meaning they have there
(labels `model_name` and `engine`); `motet_` is for what only this server has. What is told for each adapter
has few buckets, and leaves out what an adapter never did: with a hundred of them that is most of the text.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from adapters.types import AdapterRef, AdapterStatus, Tier
from server.engine.plan import Part, StepStats
from server.engine.sequence import WaitReason
from server.meters import OTHER_LABEL, Example, Histogram, Meter

_Value = tuple[dict[str, str], float]
"""Labels beside the common ones, and the number."""
_LONGEST_EXAMPLE = 128 - len("request_id")  # OpenMetrics: of names and values together
_CAPACITY_REASONS = frozenset({WaitReason.CAPACITY, WaitReason.BLOCKS})

_COUNTERS = (
    ("vllm:prompt_tokens", "Prompt tokens of requests that got their first token.", "prompt_tokens"),
    ("vllm:prompt_tokens_cached", "Of those, taken from the prefix cache.", "cached_tokens"),
    ("vllm:generation_tokens", "Tokens generated.", "generated_tokens"),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits"),
    ("vllm:gpu_prefix_cache_queries", "Older name of prefix_cache_queries.", "prefix_queries"),
    ("vllm:gpu_prefix_cache_hits", "Older name of prefix_cache_hits.", "prefix_hits"),
    ("vllm:num_preemptions", "Sequences that gave their KV blocks up and were recomputed.", "preemptions"),
    ("motet_reader_pauses", "Streams paused because their client did not read.", "reader_pauses"),
)
_METERED = (
    ("vllm:time_to_first_token_seconds", "Arrival to first token.", "first_token"),
    ("vllm:inter_token_latency_seconds", "Between two tokens of a choice.", "gap"),
    ("vllm:request_queue_time_seconds", "Hand-over to the engine until first scheduled.", "queue"),
    ("vllm:lora_adapter_load_seconds", "Reading and checking an adapter.", "load"),
)
_HISTOGRAMS = (
    ("vllm:request_time_per_output_token_seconds", "Mean of a request's gaps.", "per_output_token"),
    ("vllm:e2e_request_latency_seconds", "Arrival to last token.", "total"),
    ("vllm:request_inference_time_seconds", "First scheduled to last token.", "inference"),
    ("vllm:request_prefill_time_seconds", "First scheduled to first token.", "prefill"),
    ("vllm:request_decode_time_seconds", "First to last token.", "decode"),
    ("vllm:request_prompt_tokens", "Prompt tokens of a request.", "prompt_tokens"),
    ("vllm:request_generation_tokens", "Generated tokens of a request.", "generated_tokens"),
    ("vllm:request_params_max_tokens", "max_tokens of a request.", "max_tokens"),
    ("vllm:request_params_n", "Choices of a request.", "choices"),
    ("vllm:iteration_tokens_total", "Tokens computed in a step.", "step_tokens"),
    ("motet_step_seconds", "Time of an engine step.", "step"),
)
_BY_ADAPTER = (  # bounds that are shown, out of those that are counted
    ("motet_adapter_first_token_seconds", "Arrival to first token.", "first_token", (0.1, 0.5, 2.5, 10.0)),
    ("motet_adapter_inter_token_seconds", "Between two tokens.", "gap", (0.02, 0.05, 0.1, 0.25, 1.0)),
    ("motet_adapter_queue_seconds", "Hand-over until first scheduled.", "queue", (0.1, 1.0, 10.0, 60.0)),
    ("motet_adapter_load_seconds", "Reading and checking its files.", "load", (0.1, 0.5, 2.0, 10.0)),
)


@dataclass(slots=True)
class Counts:
    """What only grows, of the server as a whole."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    device_loads: int = 0
    device_evictions: int = 0
    reader_pauses: int = 0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What does not change from scrape to scrape."""

    name: str
    block_size: int
    max_lora: int  # distinct adapters in one batch at most
    is_accelerated: bool  # adapters are resident in the memory of a GPU, not in the host's
    max_adapter_labels: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a scrape says."""

    model: ServedModel
    unix_time: float
    clock_time: float  # the same moment on the clock of examples
    level: StepStats | None  # as of the newest step
    counts: Counts
    meters: Sequence[tuple[str, Meter]]  # by label
    sum: Meter  # of all that were ever there
    histograms: dict[str, Histogram]
    step_seconds: dict[Part, float]
    refused: dict[str, int]  # requests that were not accepted, by reason
    failed_loads: dict[str, int]  # by reason
    host_evictions: int
    awaiting: dict[str, int]  # requests that the engine does not know of yet, by registered adapter
    adapters: Sequence[AdapterStatus]  # registered

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, as an Accept header asks: Prometheus's, or OpenMetrics', which has
        examples too. From any thread.
        """
        registry = CollectorRegistry()
        registry.register(_Families(self))
        ProcessCollector(registry=registry)
        if _prefers_openmetrics(accept):
            # Every name of ours is a plain one; the default would make underscores of its colons.
            text: bytes = openmetrics.generate_latest(registry, openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


class _Families(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._labels = {"model_name": snapshot.model.name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        yield from self._levels(snapshot.level)
        for name, text, field in _COUNTERS:
            yield self._counter(name, text, [({}, getattr(snapshot.counts, field))])
        finished = [({"finished_reason": str(reason)}, n) for reason, n in snapshot.sum.finished.items()]
        yield self._counter("vllm:request_success", "Requests that are over, by reason.", finished)
        refused = [({"reason": reason}, count) for reason, count in snapshot.refused.items()]
        yield self._counter("vllm:admission_rejections", "Requests that were not accepted.", refused)
        parts = [({"part": str(part)}, seconds) for part, seconds in snapshot.step_seconds.items()]
        yield self._counter("motet_step_part_seconds", "Where the time of steps went.", parts)
        for name, text, field in _METERED:
            yield self._histogram(name, text, [({}, getattr(snapshot.sum, field))])
        for name, text, field in _HISTOGRAMS:
            yield self._histogram(name, text, [({}, snapshot.histograms[field])])
        yield from self._loaded(snapshot.level)
        yield from self._tiers()
        yield from self._by_adapter()

    # --- The engine ---------------------------------------------------------------------------------------

    def _levels(self, level: StepStats | None) -> Iterator[Metric]:
        waiting_by = {} if level is None else dict(level.waiting_by)
        num_short = sum(n for reason, n in waiting_by.items() if reason in _CAPACITY_REASONS)
        by_reason = [
            ({"reason": "capacity"}, num_short),
            ({"reason": "deferred"}, sum(waiting_by.values()) - num_short),
        ]
        use = level.blocks_used / level.blocks_total if level is not None and level.blocks_total else 0.0
        counts = self._snapshot.counts
        hit_rate = counts.prefix_hits / counts.prefix_queries if counts.prefix_queries else 0.0
        cache = {
            "block_size": str(self._snapshot.model.block_size),
            "num_gpu_blocks": str(level.blocks_total if level else 0),
        }
        running, waiting = (0, 0) if level is None else (level.running, level.waiting)
        for name, text, values in (
            ("vllm:num_requests_running", "Sequences in the batch.", [({}, running)]),
            ("vllm:num_requests_waiting", "Sequences not in the batch.", [({}, waiting)]),
            ("vllm:num_requests_waiting_by_reason", "For room, or for something of their own.", by_reason),
            ("vllm:kv_cache_usage_perc", "KV blocks in use, 0 to 1.", [({}, use)]),
            ("vllm:gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", [({}, use)]),
            ("vllm:gpu_prefix_cache_hit_rate", "Hits by queries since the start.", [({}, hit_rate)]),
            ("vllm:cache_config_info", "Sizes of the KV cache.", [(cache, 1)]),
        ):
            yield self._gauge(name, text, values)

    # --- Which adapter is where ---------------------------------------------------------------------------

    def _loaded(self, level: StepStats | None) -> Iterator[Metric]:
        """vLLM's two families. The second names the adapters that matter most, as many of each level as may
        be labels; the numbers beside it count all.
        """
        model = self._snapshot.model
        running, waiting = (level.adapters_running, level.adapters_waiting) if level is not None else ((), ())
        info = {
            "max_lora": str(model.max_lora),
            "running_lora_adapters": _names({ref.name for ref in running}),
            "waiting_lora_adapters": _names({*(ref.name for ref in waiting), *self._snapshot.awaiting}),
        }
        yield self._gauge(
            "vllm:lora_requests_info", "When this was true.", [(info, self._snapshot.unix_time)]
        )
        by_level = {"gpu": self._resident() if model.is_accelerated else [], "cpu": self._in_host_memory()}
        loaded = [
            (_loaded_labels(status, name), 1.0)
            for name, statuses in by_level.items()
            for status in sorted(statuses, key=_importance)[: model.max_adapter_labels]
        ]
        yield self._gauge("vllm:lora_adapter_loaded", "Which adapter is in which memory.", loaded)
        for name, statuses in by_level.items():
            where = "on the GPU" if name == "gpu" else "in host memory"
            family = f"vllm:num_{name}_loaded_lora_adapters"
            yield self._gauge(family, f"Adapters {where}.", [({}, len(statuses))])
        yield self._gauge("vllm:max_gpu_lora_adapters", "In one batch at most.", [({}, model.max_lora)])

    def _tiers(self) -> Iterator[Metric]:
        """An adapter that is on the device is in host memory as well, and all are registered."""
        snapshot = self._snapshot
        tiers = {
            Tier.DISK: list(snapshot.adapters),
            Tier.HOST: self._in_host_memory(),
            Tier.DEVICE: self._resident(),
        }
        numbers = [({"tier": tier.value}, len(statuses)) for tier, statuses in tiers.items()]
        yield self._gauge("motet_adapters", "Adapters registered (disk), and in each memory.", numbers)
        sizes = [({"tier": tier.value}, _num_bytes(statuses)) for tier, statuses in tiers.items()]
        yield self._gauge("motet_adapter_bytes", "Bytes of these, each revision once.", sizes)
        pinned = sum(status.is_pinned for status in snapshot.adapters)
        yield self._gauge("motet_adapters_pinned", "Adapters that stay in memory.", [({}, pinned)])
        counts = snapshot.counts
        loads = [({"tier": "host"}, snapshot.sum.load.count), ({"tier": "device"}, counts.device_loads)]
        yield self._counter("motet_adapter_loads", "Adapters that came into a memory.", loads)
        evictions = [
            ({"tier": "host"}, snapshot.host_evictions),
            ({"tier": "device"}, counts.device_evictions),
        ]
        yield self._counter("motet_adapter_evictions", "Adapters that left a memory.", evictions)
        failed = [({"reason": reason}, count) for reason, count in snapshot.failed_loads.items()]
        yield self._counter("motet_adapter_load_failures", "Files that could not be loaded.", failed)

    def _in_host_memory(self) -> list[AdapterStatus]:
        return [status for status in self._snapshot.adapters if status.is_loaded]

    def _resident(self) -> list[AdapterStatus]:
        level = self._snapshot.level
        revisions = {ref.revision for ref in level.adapters_resident} if level is not None else set()
        return [status for status in self._snapshot.adapters if status.info.ref.revision in revisions]

    # --- What each adapter was used for -------------------------------------------------------------------

    def _by_adapter(self) -> Iterator[Metric]:
        meters = self._snapshot.meters
        requests = [
            ({"adapter": label, "finished_reason": str(reason)}, count)
            for label, meter in meters
            for reason, count in meter.finished.items()
            if count
        ]
        yield self._counter("motet_adapter_requests", "Requests that are over.", requests)
        for field, text in (("prompt_tokens", "Their prompts."), ("generated_tokens", "Their answers.")):
            values = [({"adapter": label}, getattr(meter, field)) for label, meter in meters]
            yield self._counter(f"motet_adapter_{field}", text, values)
        level = self._snapshot.level
        running, waiting = (level.running_of, level.waiting_of) if level is not None else ((), ())
        for name, text, of in (
            ("motet_adapter_running", "Sequences in the batch.", _by_name(running)),
            ("motet_adapter_waiting", "Sequences not in the batch.", _by_name(waiting)),
            ("motet_adapter_awaited", "Requests that wait for its files.", self._snapshot.awaiting.items()),
        ):
            yield self._gauge(name, text, self._labelled(of))
        for name, text, field, bounds in _BY_ADAPTER:
            histograms = [({"adapter": label}, getattr(meter, field)) for label, meter in meters]
            yield self._histogram(name, text, [one for one in histograms if one[1].count], bounds)

    def _labelled(self, numbers: Iterable[tuple[str, int]]) -> list[_Value]:
        """Numbers by adapter as numbers by label: adapters without one of their own together."""
        labels = {label for label, _ in self._snapshot.meters}
        result: dict[str, int] = {}
        for name, number in numbers:
            label = name if name in labels else OTHER_LABEL
            result[label] = result.get(label, 0) + number
        return [({"adapter": label}, number) for label, number in result.items()]

    # --- Families -----------------------------------------------------------------------------------------

    def _gauge(self, name: str, text: str, values: Iterable[_Value]) -> Metric:
        return self._filled(GaugeMetricFamily(name, text), values)

    def _counter(self, name: str, text: str, values: Iterable[_Value]) -> Metric:
        return self._filled(CounterMetricFamily(name, text), values, suffix="_total")

    def _filled(self, family: Metric, values: Iterable[_Value], *, suffix: str = "") -> Metric:
        for labels, value in values:
            family.add_sample(family.name + suffix, {**self._labels, **labels}, value)
        return family

    def _histogram(
        self,
        name: str,
        text: str,
        values: Iterable[tuple[dict[str, str], Histogram]],
        bounds: Sequence[float] | None = None,
    ) -> Metric:
        """`bounds`: those that are shown; None: all that are counted."""
        family = HistogramMetricFamily(name, text)
        for labels, histogram in values:
            shared = {**self._labels, **labels}
            family.add_sample(f"{name}_count", shared, histogram.count)
            family.add_sample(f"{name}_sum", shared, histogram.total)
            for bound, number, example in self._buckets(histogram, bounds):
                family.add_sample(f"{name}_bucket", {**shared, "le": bound}, number, exemplar=example)
        return family

    def _buckets(
        self, histogram: Histogram, bounds: Sequence[float] | None
    ) -> Iterator[tuple[str, float, Exemplar | None]]:
        """Names of the bounds, how much was observed up to them, and the newest request of what each adds."""
        newest = None
        numbers = accumulate(histogram.counts)
        for index, (bound, number) in enumerate(zip((*histogram.bounds, inf), numbers, strict=True)):
            example = histogram.examples.get(index)
            if example is not None and len(example.request_id) <= _LONGEST_EXAMPLE:
                newest = max(example, newest or example)
            if bound == inf or bounds is None or bound in bounds:
                yield "+Inf" if bound == inf else repr(float(bound)), number, self._exemplar(newest)
                newest = None

    def _exemplar(self, example: Example | None) -> Exemplar | None:
        if example is None:
            return None
        since = self._snapshot.clock_time - example.at
        return Exemplar({"request_id": example.request_id}, example.value, self._snapshot.unix_time - since)


def _prefers_openmetrics(accept: str) -> bool:
    weights: dict[str, float] = {}
    for media in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in media.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        with suppress(ValueError):
            weights[kind] = max(float(weight), weights.get(kind, 0.0))
    openmetrics_weight = weights.get("application/openmetrics-text", 0.0)
    return openmetrics_weight > 0 and openmetrics_weight >= weights.get("text/plain", 0.0)


def _loaded_labels(status: AdapterStatus, level: str) -> dict[str, str]:
    info = status.info
    return {
        "adapter_name": info.ref.name,
        "level": level,
        "pinned": "true" if status.is_pinned else "false",
        "rank": str(info.rank),
    }


def _importance(status: AdapterStatus) -> tuple[bool, bool, float, str]:
    """Sorts the most important first: pinned ones, those in use, those used last."""
    return not status.is_pinned, not status.users, -(status.last_used or 0.0), status.info.ref.name


def _num_bytes(statuses: Iterable[AdapterStatus]) -> int:
    infos = (status.info for status in statuses)
    return sum({info.revision or info.ref.name: info.num_bytes for info in infos}.values())


def _by_name(numbers: Iterable[tuple[AdapterRef, int]]) -> Iterator[tuple[str, int]]:
    """Two revisions of one name are one adapter here."""
    return ((ref.name, number) for ref, number in numbers)


def _names(names: Iterable[str]) -> str:
    """A list in one label; a comma in a name must not look like two adapters."""
    return ",".join(sorted(name.replace(",", "%2C") for name in names))
