"""What a router, an autoscaler or a person reads at /metrics."""

from collections import Counter
from collections.abc import Iterable

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as strict_families
from prometheus_client.parser import text_string_to_metric_families

from adapters.errors import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
)
from adapters.types import AdapterInfo, AdapterRef, AdapterStatus, Revision
from server.engine.plan import Part, SecondsByPart, StepStats
from server.engine.sequence import WaitReason
from server.metrics import Metrics, RequestStats
from server.types import FinishReason, Timing


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, Revision(f"revision of {name}"))


def status(
    name: str,
    rank: int = 8,
    *,
    is_loaded: bool = True,
    is_pinned: bool = False,
    revision: str | None = None,
    last_used: float | None = None,
) -> AdapterStatus:
    known = ref(name) if revision is None else AdapterRef(name, Revision(revision))
    info = AdapterInfo(known, f"somewhere/{name}", "local", rank, ("q_proj",), 1024, 0)
    return AdapterStatus(info, is_loaded, is_pinned, 0, last_used, 1, 0.25)


def step(
    *,
    running: int = 0,
    waiting_by: tuple[tuple[WaitReason, int], ...] = (),
    resident: Iterable[str] = (),
    running_adapters: Iterable[str] = (),
    waiting_adapters: Iterable[str] = (),
    seconds: SecondsByPart = (),
) -> StepStats:
    uses, waits = Counter(map(ref, running_adapters)), Counter(map(ref, waiting_adapters))
    return StepStats(
        running=running,
        waiting=sum(n for _, n in waiting_by),
        waiting_by=waiting_by,
        prefill_tokens=10,
        decode_tokens=2,
        prefix_queries=100,
        prefix_hits=25,
        preemptions=1,
        blocks_used=5,
        blocks_total=20,
        adapters_resident=tuple(map(ref, resident)),
        adapters_running=tuple(uses),
        adapters_waiting=tuple(waits),
        step_s=0.01,
        seconds=seconds,
        running_of=tuple(uses.items()),
        waiting_of=tuple(waits.items()),
    )


def request(
    *, adapter: str | None = None, reason: FinishReason = FinishReason.STOP, generated: int = 5
) -> RequestStats:
    timing = Timing(received=0.0, queued=0.1, started=0.3, first_token=0.5, last_token=0.9)
    return RequestStats("r", adapter, reason, 1, 16, 7, 2, generated, timing)


def count(metrics: Metrics, stats: RequestStats) -> None:
    """A request from its beginning to its end."""
    metrics.end_request(stats, metrics.begin_request(stats.adapter))


def make_metrics(**options: object) -> Metrics:
    settings: dict[str, object] = {
        "block_size": 16,
        "max_lora": 4,
        "is_accelerated": True,
        "unix_time": lambda: 1e9,
    }
    return Metrics("base", **(settings | options))  # type: ignore[arg-type]


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample of ours as name{other labels} to value; the common labels are checked and left out."""
    found = {}
    for family in text_string_to_metric_families(metrics.snapshot().render("")[0].decode()):
        for sample in family.samples:
            if sample.name.startswith("process_"):
                continue
            labels = dict(sample.labels)
            assert (labels.pop("model_name"), labels.pop("engine")) == ("base", "0")
            inside = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
            found[f"{sample.name}{{{inside}}}" if inside else sample.name] = sample.value
    return found


def test_a_server_that_has_done_nothing_can_be_scraped() -> None:
    found = samples(make_metrics())
    assert found["vllm:num_requests_running"] == 0
    assert found["vllm:kv_cache_usage_perc"] == 0


def test_levels_are_those_of_the_newest_step() -> None:
    metrics = make_metrics()
    metrics.observe_step(step(running=9), 1)
    waiting = (
        (WaitReason.CAPACITY, 1),
        (WaitReason.BLOCKS, 2),
        (WaitReason.ADAPTER, 3),
        (WaitReason.READER, 4),
    )
    metrics.observe_step(step(running=3, waiting_by=waiting), 1)
    found = samples(metrics)
    assert found["vllm:num_requests_running"] == 3
    assert found["vllm:num_requests_waiting"] == 10
    assert found["vllm:num_requests_waiting_by_reason{reason=capacity}"] == 3
    assert found["vllm:num_requests_waiting_by_reason{reason=deferred}"] == 7
    assert found["vllm:kv_cache_usage_perc"] == found["vllm:gpu_cache_usage_perc"] == 0.25
    assert found["vllm:cache_config_info{block_size=16,num_gpu_blocks=20}"] == 1


def test_counters_add_up_over_steps_under_old_and_new_names() -> None:
    metrics = make_metrics()
    for _ in range(4):
        metrics.observe_step(step(), 3)
    found = samples(metrics)
    assert found["vllm:generation_tokens_total"] == 12
    assert found["vllm:prefix_cache_hits_total"] == found["vllm:gpu_prefix_cache_hits_total"] == 100
    assert found["vllm:prefix_cache_queries_total"] == found["vllm:gpu_prefix_cache_queries_total"] == 400
    assert found["vllm:gpu_prefix_cache_hit_rate"] == 0.25
    assert found["vllm:num_preemptions_total"] == 4
    assert found["vllm:iteration_tokens_total_sum"] == 48
    assert found["motet_step_seconds_count"] == 4


def test_where_the_time_of_steps_went_adds_up_by_part() -> None:
    metrics = make_metrics()
    assert not [name for name in samples(metrics) if name.startswith("motet_step_part")]
    metrics.observe_step(step(seconds=((Part.LINEAR, 0.5), (Part.SAMPLING, 0.25))), 1)
    metrics.observe_step(step(seconds=((Part.LINEAR, 0.5),)), 1)
    found = samples(metrics)
    assert found["motet_step_part_seconds_total{part=linear layers}"] == 1.0
    assert found["motet_step_part_seconds_total{part=sampling}"] == 0.25


def test_a_finished_request_is_counted_with_its_times() -> None:
    metrics = make_metrics()
    meter = metrics.begin_request(None)
    meter.first_token.observe(0.5)
    metrics.observe_prompt(7, 2)
    meter.gap.observe(0.1)
    metrics.end_request(request(), meter)
    count(metrics, request(reason=FinishReason.ABORT, generated=0))
    found = samples(metrics)
    assert found["vllm:request_success_total{finished_reason=stop}"] == 1
    assert found["vllm:request_success_total{finished_reason=abort}"] == 1
    assert found["vllm:prompt_tokens_total"] == 7
    assert found["vllm:prompt_tokens_cached_total"] == 2
    assert found["vllm:time_to_first_token_seconds_sum"] == 0.5
    assert found["vllm:inter_token_latency_seconds_count"] == 1
    assert found["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(0.9)
    assert found["vllm:e2e_request_latency_seconds_count"] == 1
    assert found["vllm:request_queue_time_seconds_sum"] == pytest.approx(0.4)
    assert found["vllm:request_prefill_time_seconds_sum"] == pytest.approx(0.2)
    assert found["vllm:request_decode_time_seconds_sum"] == pytest.approx(0.4)
    assert found["vllm:request_inference_time_seconds_sum"] == pytest.approx(0.6)
    assert found["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(0.1)


def test_a_value_on_a_bound_belongs_to_the_bucket_below() -> None:
    metrics = make_metrics()
    meter = metrics.begin_request(None)
    for seconds in (0.01, 0.0101, 99.0):
        meter.gap.observe(seconds)
    found = samples(metrics)
    assert found["vllm:inter_token_latency_seconds_bucket{le=0.01}"] == 1
    assert found["vllm:inter_token_latency_seconds_bucket{le=0.02}"] == 2
    assert found["vllm:inter_token_latency_seconds_bucket{le=10.0}"] == 2
    assert found["vllm:inter_token_latency_seconds_bucket{le=+Inf}"] == 3


def test_lora_requests_info_has_one_true_label_set_at_a_time() -> None:
    metrics = make_metrics()
    metrics.observe_step(step(running_adapters=["b", "a"], waiting_adapters=["c"]), 0)
    metrics.observe_step(step(running_adapters=["c"], resident=["a", "b", "c"]), 0)
    info_samples = {name: value for name, value in samples(metrics).items() if "lora_requests_info" in name}
    assert info_samples == {
        "vllm:lora_requests_info{max_lora=4,running_lora_adapters=c,waiting_lora_adapters=}": 1e9
    }


def test_adapter_lists_are_sorted_and_a_comma_in_a_name_is_not_a_separator() -> None:
    metrics = make_metrics()
    metrics.observe_step(step(running_adapters=["b", "a,x"]), 0)
    assert any("running_lora_adapters=a%2Cx,b," in name for name in samples(metrics))


def test_an_adapter_that_runs_does_not_wait_and_nothing_is_left_when_all_is_over() -> None:
    metrics = make_metrics()
    metrics.observe_step(step(running=1, running_adapters=["a"], waiting_adapters=["b"]), 0)
    both = samples(metrics)
    metrics.observe_step(step(), 0)
    none = samples(metrics)
    assert "vllm:lora_requests_info{max_lora=4,running_lora_adapters=a,waiting_lora_adapters=b}" in both
    assert "vllm:lora_requests_info{max_lora=4,running_lora_adapters=,waiting_lora_adapters=}" in none


def test_a_request_whose_adapter_is_being_read_waits_although_the_engine_does_not_know_it() -> None:
    metrics = make_metrics(is_adapter=lambda name: name == "a")
    with metrics.awaiting("a"), metrics.awaiting("a"), metrics.awaiting("whatever a client says"):
        during = samples(metrics)
    after = samples(metrics)
    assert "vllm:lora_requests_info{max_lora=4,running_lora_adapters=,waiting_lora_adapters=a}" in during
    assert {name: value for name, value in during.items() if "awaited" in name} == {
        "motet_adapter_awaited{adapter=other}": 2
    }
    assert not any("awaited" in name for name in after)


def test_loaded_adapters_are_told_by_level() -> None:
    metrics = make_metrics(
        adapters=lambda: [status("a", 8, is_loaded=False), status("b", 16, is_pinned=True)]
    )
    metrics.observe_step(step(resident=["a"]), 0)
    found = samples(metrics)
    assert found["vllm:lora_adapter_loaded{adapter_name=a,level=gpu,pinned=false,rank=8}"] == 1
    assert found["vllm:lora_adapter_loaded{adapter_name=b,level=cpu,pinned=true,rank=16}"] == 1
    assert not any("adapter_name=a,level=cpu" in name for name in found)
    assert found["vllm:num_gpu_loaded_lora_adapters"] == 1
    assert found["vllm:num_cpu_loaded_lora_adapters"] == 1


def test_of_more_loaded_adapters_than_labels_those_are_named_that_matter_most() -> None:
    statuses = [status(f"a{i}", last_used=float(i)) for i in range(9)]
    statuses += [status("old", is_pinned=True), status("never")]
    found = samples(make_metrics(adapters=lambda: statuses, max_adapter_labels=3))
    named = {name for name in found if "lora_adapter_loaded" in name and "num" not in name}
    assert {name.partition("adapter_name=")[2].partition(",")[0] for name in named} == {"old", "a8", "a7"}
    assert found["vllm:num_cpu_loaded_lora_adapters"] == 11


def test_without_a_gpu_no_adapter_is_said_to_be_on_one() -> None:
    metrics = make_metrics(is_accelerated=False, adapters=lambda: [status("a")])
    metrics.observe_step(step(resident=["a"]), 0)
    found = samples(metrics)
    assert found["vllm:num_gpu_loaded_lora_adapters"] == 0
    assert found["motet_adapters{tier=device}"] == 1


def test_tiers_count_adapters_and_each_revision_s_bytes_once() -> None:
    twins = [status("a", revision="r"), status("b", revision="r"), status("c", is_loaded=False)]
    metrics = make_metrics(adapters=lambda: twins, host_evictions=lambda: 5)
    metrics.observe_step(step(resident=["c"]), 0)
    found = samples(metrics)
    assert [found[f"motet_adapters{{tier={tier}}}"] for tier in ("disk", "host", "device")] == [3, 2, 1]
    assert [found[f"motet_adapter_bytes{{tier={tier}}}"] for tier in ("disk", "host", "device")] == [
        2048,
        1024,
        1024,
    ]
    assert found["motet_adapter_evictions_total{tier=host}"] == 5


def test_loads_and_evictions_are_seen_from_what_is_resident() -> None:
    metrics = make_metrics()
    for resident in (["a"], ["a", "b"], ["a", "b"], ["b", "c"], []):
        metrics.observe_step(step(resident=resident), 0)
    found = samples(metrics)
    assert found["motet_adapter_loads_total{tier=device}"] == 3
    assert found["motet_adapter_evictions_total{tier=device}"] == 3


def test_loads_count_for_their_adapter_and_for_all_together() -> None:
    metrics = make_metrics(is_adapter=lambda name: name == "a")
    metrics.observe_adapter_load("a", 0.25)
    metrics.observe_adapter_load("org/remote", 3.0)
    found = samples(metrics)
    assert found["motet_adapter_load_seconds_bucket{adapter=a,le=0.5}"] == 1
    assert found["motet_adapter_load_seconds_sum{adapter=a}"] == 0.25
    assert found["vllm:lora_adapter_load_seconds_count"] == 2
    assert found["motet_adapter_loads_total{tier=host}"] == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AdapterNotFound("m"), "not_found"),
        (AdapterInvalid("m"), "invalid"),
        (AdapterIncompatible("m"), "incompatible"),
        (AdapterTooLarge("m"), "too_large"),
        (AdapterError("m"), "invalid"),
    ],
)
def test_failed_loads_are_counted_by_reason(error: AdapterError, reason: str) -> None:
    metrics = make_metrics()
    metrics.observe_failed_load(error)
    assert samples(metrics)[f"motet_adapter_load_failures_total{{reason={reason}}}"] == 1


def test_what_an_adapter_was_used_for_is_told_with_few_buckets() -> None:
    metrics = make_metrics()
    meter = metrics.begin_request("a")
    for seconds in (0.01, 0.03, 0.2):
        meter.gap.observe(seconds)
    meter.first_token.observe(0.3)
    metrics.end_request(request(adapter="a"), meter)
    count(metrics, request(adapter="a", reason=FinishReason.ABORT, generated=0))
    found = {name: value for name, value in samples(metrics).items() if "adapter=a" in name}
    assert found["motet_adapter_requests_total{adapter=a,finished_reason=stop}"] == 1
    assert found["motet_adapter_requests_total{adapter=a,finished_reason=abort}"] == 1
    assert found["motet_adapter_prompt_tokens_total{adapter=a}"] == 14
    assert found["motet_adapter_generated_tokens_total{adapter=a}"] == 5
    assert found["motet_adapter_queue_seconds_sum{adapter=a}"] == pytest.approx(0.4)
    assert found["motet_adapter_first_token_seconds_bucket{adapter=a,le=0.1}"] == 0
    assert found["motet_adapter_first_token_seconds_bucket{adapter=a,le=0.5}"] == 1
    bounds = ("0.02", "0.05", "0.1", "0.25", "1.0", "+Inf")
    gaps = [found[f"motet_adapter_inter_token_seconds_bucket{{adapter=a,le={bound}}}"] for bound in bounds]
    assert gaps == [1, 2, 2, 3, 3, 3]
    assert not any("load_seconds" in name for name in found)


def test_running_and_waiting_sequences_are_told_by_adapter() -> None:
    metrics = make_metrics()
    metrics.begin_request("a")
    metrics.observe_step(step(running_adapters=["a", "a", "b"], waiting_adapters=["a", "b", "c"]), 0)
    found = {
        name: value for name, value in samples(metrics).items() if "running{" in name or "waiting{" in name
    }
    assert found == {
        "motet_adapter_running{adapter=a}": 2,
        "motet_adapter_running{adapter=other}": 1,
        "motet_adapter_waiting{adapter=a}": 1,
        "motet_adapter_waiting{adapter=other}": 2,
    }


def requests_by_label(metrics: Metrics) -> dict[str, float]:
    prefix = "motet_adapter_requests_total{adapter="
    found = samples(metrics).items()
    return {
        name.removeprefix(prefix).partition(",")[0]: value for name, value in found if name.startswith(prefix)
    }


def test_adapter_labels_are_bounded() -> None:
    metrics = make_metrics(max_adapter_labels=2)
    for name in (None, "a", "b", "c", "a"):
        count(metrics, request(adapter=name))
    assert requests_by_label(metrics) == {"__base_model__": 1, "a": 2, "b": 1, "other": 1}


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_name_that_is_not_registered_never_becomes_a_label() -> None:
    metrics = make_metrics(is_adapter=lambda name: name == "a")
    for name in ("a", "a:0.5+b:2", "a:0.6+b:2"):
        count(metrics, request(adapter=name))
    assert requests_by_label(metrics) == {"a": 1, "other": 2}


def test_an_unloaded_adapter_keeps_its_label_until_it_was_scraped_and_no_count_is_lost() -> None:
    known, clock = {"a"}, Time()
    metrics = make_metrics(is_adapter=known.__contains__, clock=clock)
    live = metrics.begin_request("a")
    known.clear()
    clock.now += 1000
    assert not requests_by_label(metrics)  # it still runs: nothing to tell, and nothing forgotten
    metrics.end_request(request(adapter="a"), live)
    clock.now += 60
    assert requests_by_label(metrics) == {"a": 1}
    clock.now += 300
    assert requests_by_label(metrics) == {}
    assert samples(metrics)["vllm:request_success_total{finished_reason=stop}"] == 1
    assert not any("adapter=a" in name for name in samples(metrics))


def test_a_label_goes_over_to_another_adapter_only_after_an_hour_without_use() -> None:
    clock = Time()
    metrics = make_metrics(max_adapter_labels=1, clock=clock)
    count(metrics, request(adapter="a"))
    clock.now += 3599
    count(metrics, request(adapter="b"))
    before = requests_by_label(metrics)
    clock.now += 1
    count(metrics, request(adapter="b"))
    after = requests_by_label(metrics)
    assert before == {"a": 1, "other": 1}
    assert after == {"b": 1, "other": 1}
    assert samples(metrics)["vllm:request_success_total{finished_reason=stop}"] == 3


def test_a_label_of_an_adapter_that_was_only_loaded_goes_to_one_that_is_used() -> None:
    metrics = make_metrics(max_adapter_labels=1)
    metrics.observe_adapter_load("a", 0.1)
    count(metrics, request(adapter="b"))
    assert requests_by_label(metrics) == {"b": 1}
    assert samples(metrics)["vllm:lora_adapter_load_seconds_count"] == 1


def test_a_label_in_use_is_never_taken() -> None:
    clock = Time()
    metrics = make_metrics(max_adapter_labels=1, clock=clock)
    meter = metrics.begin_request("a")
    clock.now += 10_000
    count(metrics, request(adapter="b"))
    metrics.end_request(request(adapter="a"), meter)
    assert requests_by_label(metrics) == {"a": 1, "other": 1}


def test_the_scrape_of_a_hundred_busy_adapters_stays_below_half_a_megabyte() -> None:
    statuses = [status(f"customer-{i:04}/assistant") for i in range(2000)]
    metrics = make_metrics(adapters=lambda: statuses)
    for each in statuses:
        name = each.info.ref.name
        metrics.observe_adapter_load(name, 0.2)
        meter = metrics.begin_request(name)
        meter.first_token.observe(0.3)
        meter.gap.observe(0.02)
        metrics.end_request(request(adapter=name), meter)
        count(metrics, request(adapter=name, reason=FinishReason.ABORT))
    text = metrics.snapshot().render("")[0]
    assert text.count(b"motet_adapter_inter_token_seconds_count") == 101  # and "other"
    assert len(text) < 500_000


OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


def examples(metrics: Metrics, name: str) -> dict[str, dict[str, str]]:
    """By bound, what OpenMetrics says of a request in the bucket."""
    text, content_type = metrics.snapshot().render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    return {
        sample.labels["le"]: sample.exemplar.labels
        for family in strict_families(text.decode())
        for sample in family.samples
        if sample.name == f"{name}_bucket" and sample.exemplar is not None
    }


def test_a_bucket_leads_to_a_request() -> None:
    metrics = make_metrics(is_adapter=lambda name: True)
    meter = metrics.begin_request("pirate")
    meter.first_token.observe(0.3, "req-a")
    meter.first_token.observe(0.04, "req-b")
    meter.first_token.observe(0.06)
    metrics.end_request(request(adapter="pirate"), meter)

    found = examples(metrics, "vllm:time_to_first_token_seconds")
    assert found == {"0.05": {"request_id": "req-b"}, "0.5": {"request_id": "req-a"}}
    by_adapter = examples(metrics, "motet_adapter_first_token_seconds")
    assert by_adapter == {"0.1": {"request_id": "req-b"}, "0.5": {"request_id": "req-a"}}
    assert len(examples(metrics, "vllm:e2e_request_latency_seconds")) == 1
    plain, content_type = metrics.snapshot().render("*/*")
    assert b"req-a" not in plain
    assert content_type.startswith("text/plain; version=0.0.4")


def test_the_newest_request_of_a_bucket_is_shown_with_its_time() -> None:
    metrics = make_metrics(clock=lambda: 500.0)
    for adapter, at in (("haiku", 400.0), ("pirate", 470.0), ("json", 450.0)):
        meter = metrics.begin_request(adapter)
        meter.first_token.observe(0.3, f"req-{adapter}", at)
    text = metrics.snapshot().render(OPENMETRICS)[0].decode()
    found = [
        sample.exemplar
        for family in strict_families(text)
        for sample in family.samples
        if sample.name == "vllm:time_to_first_token_seconds_bucket" and sample.exemplar is not None
    ]
    assert [(one.labels["request_id"], one.value, float(one.timestamp)) for one in found] == [
        ("req-pirate", 0.3, 1e9 - 30.0)
    ]


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        (OPENMETRICS, True),
        ("application/openmetrics-text;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2", True),
        ("text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5", False),
        ("Application/OpenMetrics-Text; version=1.0.0", True),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=much", False),
        ("text/html,*/*", False),
        ("", False),
    ],
)
def test_the_format_is_the_one_that_is_preferred(accept: str, is_openmetrics: bool) -> None:
    text, content_type = make_metrics().snapshot().render(accept)
    assert content_type.startswith("application/openmetrics-text") == is_openmetrics
    assert text.endswith(b"# EOF\n") == is_openmetrics


def test_an_id_that_is_too_long_for_openmetrics_is_left_out() -> None:
    metrics = make_metrics()
    meter = metrics.begin_request(None)
    meter.first_token.observe(0.3, "r" * 119)
    meter.first_token.observe(0.04, "r" * 118)
    assert list(examples(metrics, "vllm:time_to_first_token_seconds")) == ["0.05"]


def test_refusals_are_counted_by_reason() -> None:
    metrics = make_metrics()
    metrics.observe_refusal("queue_full")
    assert samples(metrics)["vllm:admission_rejections_total{reason=queue_full}"] == 1


def test_two_servers_in_one_process_do_not_share_numbers() -> None:
    first, second = make_metrics(), make_metrics()
    first.observe_reader_pause()
    first.observe_adapter_load("a", 0.5)
    assert samples(first)["motet_reader_pauses_total"] == 1
    assert samples(second)["motet_reader_pauses_total"] == 0
    assert samples(second)["vllm:lora_adapter_load_seconds_count"] == 0


def test_names_with_quotes_and_backslashes_survive_the_format() -> None:
    metrics = make_metrics()
    count(metrics, request(adapter='we"ird\\name'))
    assert any('adapter=we"ird\\name' in name for name in samples(metrics))
