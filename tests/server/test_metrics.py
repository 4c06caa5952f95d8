"""What a router, an autoscaler or a person reads at /metrics."""

from collections.abc import Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters.types import AdapterInfo, AdapterRef, Revision
from server.engine.plan import StepStats
from server.engine.sequence import WaitReason
from server.metrics import Metrics, RequestStats
from server.types import FinishReason, Timing


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, Revision(f"revision of {name}"))


def info(name: str, rank: int = 8) -> AdapterInfo:
    return AdapterInfo(ref(name), f"somewhere/{name}", "local", rank, ("q_proj",), 1024, 0)


def step(
    *,
    running: int = 0,
    waiting_by: tuple[tuple[WaitReason, int], ...] = (),
    resident: Iterable[str] = (),
    running_adapters: Iterable[str] = (),
    waiting_adapters: Iterable[str] = (),
) -> StepStats:
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
        adapters_running=tuple(map(ref, running_adapters)),
        adapters_waiting=tuple(map(ref, waiting_adapters)),
        step_s=0.01,
    )


def request(
    *, adapter: str | None = None, reason: FinishReason = FinishReason.STOP, generated: int = 5
) -> RequestStats:
    timing = Timing(received=0.0, queued=0.1, started=0.3, first_token=0.5, last_token=0.9)
    return RequestStats("r", adapter, reason, 1, 16, 7, 2, generated, timing)


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
    for family in text_string_to_metric_families(metrics.render().decode()):
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


def test_a_finished_request_is_counted_with_its_times() -> None:
    metrics = make_metrics()
    metrics.observe_first_token(0.5)
    metrics.observe_prompt(7, 2)
    metrics.observe_gap(0.1)
    metrics.observe_request(request())
    metrics.observe_request(request(reason=FinishReason.ABORT, generated=0))
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
    for seconds in (0.01, 0.0101, 99.0):
        metrics.observe_gap(seconds)
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


def test_loaded_adapters_are_told_by_level() -> None:
    metrics = make_metrics(
        adapters=lambda: [info("a", 8), info("b", 16)], in_host_memory=lambda r: r.name == "b"
    )
    metrics.observe_step(step(resident=["a"]), 0)
    found = samples(metrics)
    assert found["vllm:lora_adapter_loaded{adapter_name=a,level=gpu,pinned=false,rank=8}"] == 1
    assert found["vllm:lora_adapter_loaded{adapter_name=b,level=cpu,pinned=false,rank=16}"] == 1
    assert not any("adapter_name=a,level=cpu" in name for name in found)
    assert found["vllm:num_gpu_loaded_lora_adapters"] == 1
    assert found["vllm:num_cpu_loaded_lora_adapters"] == 1


def test_without_a_gpu_no_adapter_is_said_to_be_on_one() -> None:
    metrics = make_metrics(is_accelerated=False, adapters=lambda: [info("a")])
    metrics.observe_step(step(resident=["a"]), 0)
    assert samples(metrics)["vllm:num_gpu_loaded_lora_adapters"] == 0


def test_loads_and_evictions_are_seen_from_what_is_resident() -> None:
    metrics = make_metrics()
    for resident in (["a"], ["a", "b"], ["a", "b"], ["b", "c"], []):
        metrics.observe_step(step(resident=resident), 0)
    found = samples(metrics)
    assert found["motet_adapter_loads_total"] == 3
    assert found["motet_adapter_evictions_total"] == 3


def test_adapter_labels_are_bounded() -> None:
    metrics = make_metrics(max_adapter_labels=2)
    for name in (None, "a", "b", "c", "a"):
        metrics.observe_request(request(adapter=name))
    found = {name: value for name, value in samples(metrics).items() if "motet_adapter_requests" in name}
    assert found == {
        "motet_adapter_requests_total{adapter=__base_model__}": 1,
        "motet_adapter_requests_total{adapter=a}": 2,
        "motet_adapter_requests_total{adapter=other}": 2,
    }


def test_refusals_are_counted_by_reason() -> None:
    metrics = make_metrics()
    metrics.observe_refusal("queue_full")
    assert samples(metrics)["vllm:admission_rejections_total{reason=queue_full}"] == 1


def test_two_servers_in_one_process_do_not_share_numbers() -> None:
    first, second = make_metrics(), make_metrics()
    first.observe_reader_pause()
    first.observe_adapter_load(0.5)
    assert samples(first)["motet_reader_pauses_total"] == 1
    assert samples(second)["motet_reader_pauses_total"] == 0
    assert samples(second)["vllm:lora_adapter_load_seconds_count"] == 0


def test_names_with_quotes_and_backslashes_survive_the_format() -> None:
    metrics = make_metrics()
    metrics.observe_request(request(adapter='we"ird\\name'))
    assert any('adapter=we"ird\\name' in name for name in samples(metrics))
