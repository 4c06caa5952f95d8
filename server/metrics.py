"""Numbers about the service: counted on the event loop, told to whoever scrapes.

Counting is into plain integers and lists, which costs a fraction of a microsecond; nothing else happens until
somebody asks. meters.py keeps what belongs to an adapter, and how many adapters get a label of their own;
scrape.py writes it all down.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from adapters.errors import (
    AdapterError,
    AdapterIncompatible,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnavailable,
)
from adapters.types import AdapterStatus, Clock
from server.engine.plan import Part, StepStats
from server.meters import REQUEST_SECONDS, TOKEN_SECONDS, Histogram, Meter, Meters
from server.scrape import Counts, ServedModel, Snapshot
from server.types import FinishReason, Timing

_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 65536.0)
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
_FAILURES: tuple[tuple[type[AdapterError], str], ...] = (
    (AdapterNotFound, "not_found"),
    (AdapterIncompatible, "incompatible"),
    (AdapterTooLarge, "too_large"),
    (AdapterUnavailable, "unavailable"),
    (AdapterError, "invalid"),
)


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


class _Histograms:
    """Where the time and the tokens went, of all requests together."""

    def __init__(self) -> None:
        self.per_output_token = Histogram(TOKEN_SECONDS)
        self.total = Histogram(REQUEST_SECONDS)
        self.inference = Histogram(REQUEST_SECONDS)
        self.prefill = Histogram(REQUEST_SECONDS)
        self.decode = Histogram(REQUEST_SECONDS)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generated_tokens = Histogram(_TOKENS)
        self.max_tokens = Histogram(_TOKENS)
        self.choices = Histogram(_CHOICES)
        self.step_tokens = Histogram(_TOKENS)
        self.step = Histogram(_STEP_SECONDS)


class Metrics:
    """Counted on the event loop; not thread-safe."""

    def __init__(
        self,
        model_name: str,
        *,
        block_size: int,
        max_lora: int,
        is_accelerated: bool,
        adapters: Callable[[], Iterable[AdapterStatus]] = tuple,
        is_adapter: Callable[[str], bool] = lambda name: True,
        host_evictions: Callable[[], int] = lambda: 0,
        max_adapter_labels: int = 100,
        clock: Clock = time.monotonic,
        unix_time: Clock = time.time,
    ) -> None:
        """`max_lora`: distinct adapters in one batch at most. `adapters`: the registered ones, at a scrape.
        `is_adapter`: whether one of that name is registered. `host_evictions`: how many left the host's
        memory so far. `is_accelerated`: adapters are resident in the memory of a GPU, not in the host's."""
        self._model = ServedModel(model_name, block_size, max_lora, is_accelerated, max_adapter_labels)
        self._adapters = adapters
        self._is_adapter = is_adapter
        self._host_evictions = host_evictions
        self._unix_time = unix_time
        self._clock = clock
        self._level: StepStats | None = None
        self._counts = Counts()
        self._meters = Meters(max_adapter_labels, is_adapter, clock)
        self._histograms = _Histograms()
        self._step_seconds: dict[Part, float] = {}
        # Zeros, where the words are known: what grows from nothing has not grown, to who watches it.
        self._refused: dict[str, int] = {"queue_full": 0}
        self._failed_loads: dict[str, int] = {word: 0 for _, word in _FAILURES}
        self._awaiting: dict[str, int] = {}  # requests that wait for their adapter's files, by its name

    # --- The engine ---------------------------------------------------------------------------------------

    def observe_step(self, stats: StepStats, num_generated: int) -> None:
        counts, level = self._counts, self._level
        counts.generated_tokens += num_generated
        counts.prefix_queries += stats.prefix_queries
        counts.prefix_hits += stats.prefix_hits
        counts.preemptions += stats.preemptions
        self._histograms.step.observe(stats.step_s)
        for part, seconds in stats.seconds:
            self._step_seconds[part] = self._step_seconds.get(part, 0.0) + seconds
        self._histograms.step_tokens.observe(stats.prefill_tokens + stats.decode_tokens)
        before = () if level is None else level.adapters_resident
        if stats.adapters_resident != before:
            counts.device_loads += len(set(stats.adapters_resident).difference(before))
            counts.device_evictions += len(set(before).difference(stats.adapters_resident))
        self._level = stats

    # --- Requests -----------------------------------------------------------------------------------------

    def begin_request(self, adapter: str | None) -> Meter:
        """One was accepted; `adapter` is None for the base model. What happens to it token by token is
        counted into the meter. `end_request` follows.
        """
        return self._meters.begin(adapter)

    def observe_prompt(self, num_prompt: int, num_cached: int) -> None:
        """Once per prompt of a request, when the first answer to it is there."""
        self._counts.prompt_tokens += num_prompt
        self._counts.cached_tokens += num_cached

    def end_request(self, stats: RequestStats, meter: Meter) -> None:
        """Once per accepted request, when it is over."""
        self._meters.end(meter)
        meter.finished[stats.reason] += 1
        meter.prompt_tokens += stats.prompt_tokens
        meter.generated_tokens += stats.generated_tokens
        histograms, timing, now = self._histograms, stats.timing, self._clock()
        histograms.prompt_tokens.observe(stats.prompt_tokens)
        histograms.generated_tokens.observe(stats.generated_tokens)
        histograms.max_tokens.observe(stats.max_tokens)
        histograms.choices.observe(stats.n)
        meter.queue.observe(timing.queue_s, stats.request_id, now)
        if not stats.generated_tokens:
            return  # it never got far enough for the others to mean anything
        decode_s = timing.last_token - timing.first_token
        histograms.total.observe(timing.total_s, stats.request_id, now)
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

    # --- Adapters -----------------------------------------------------------------------------------------

    def observe_adapter_load(self, adapter: str, seconds: float) -> None:
        """Files read, checked and converted into host memory. `adapter`: its name, or where it came from."""
        self._meters.of(adapter).load.observe(seconds)

    @contextmanager
    def awaiting(self, *adapters: str) -> Iterator[None]:
        """Around what a request waits for before the engine knows of it: its adapters' files."""
        for adapter in adapters:
            self._awaiting[adapter] = self._awaiting.get(adapter, 0) + 1
        try:
            yield
        finally:
            for adapter in adapters:
                self._awaiting[adapter] -= 1
                if not self._awaiting[adapter]:
                    del self._awaiting[adapter]

    def observe_failed_load(self, error: AdapterError) -> None:
        """Files that could not be loaded."""
        reason = next(word for kind, word in _FAILURES if isinstance(error, kind))
        self._failed_loads[reason] = self._failed_loads.get(reason, 0) + 1

    # --- Scrapes ------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All numbers as they are now, to be written in any thread."""
        self._meters.forget_unknown()
        histograms: dict[str, Histogram] = vars(self._histograms)
        return Snapshot(
            model=self._model,
            unix_time=self._unix_time(),
            clock_time=self._clock(),
            level=self._level,
            counts=replace(self._counts),
            meters=[(label, meter.copy()) for label, meter in self._meters.items()],
            sum=self._meters.sum(),
            histograms={name: histogram.copy() for name, histogram in histograms.items()},
            step_seconds=dict(self._step_seconds),
            refused=dict(self._refused),
            failed_loads=dict(self._failed_loads),
            host_evictions=self._host_evictions(),
            awaiting={name: n for name, n in self._awaiting.items() if self._is_adapter(name)},
            adapters=tuple(self._adapters()),
        )
