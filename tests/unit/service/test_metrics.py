"""Metrics: names, forms, and the page about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram

from lorax_contract.errors import (
    GenerationError,
    IncompleteGenerationError,
    OverloadedError,
    ValidationError,
)
from lorax_router.core.adapters.table import AdapterCapacity
from lorax_router.core.cost import LinearCost
from lorax_router.core.scheduler import Scheduler
from lorax_router.service.adapters.catalog import AdapterCatalog
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.service.engine.port import EngineStats
from lorax_router.service.metrics.doc import metrics_page
from lorax_router.service.metrics.exposition import to_json, to_text
from lorax_router.service.metrics.front_processes import FrontUsage
from lorax_router.service.metrics.histogram import HistogramView, SharedHistogram
from lorax_router.service.metrics.recorder import (
    ALL_METRICS,
    DURATION_BUCKETS,
    FAILURE_LABELS,
    Metrics,
    failure_label,
)
from lorax_router.service.metrics.spec import MetricSpec

ROOT = Path(__file__).parents[3]


def make_metrics() -> Metrics:
    metrics = Metrics(model_name="base", max_input_length=1000, max_total_tokens=2000)
    metrics.watch_engine(lambda: EngineStats(2, 3, 10, 4, 5, 6), block_size=16)
    catalog = AdapterCatalog(lambda entry: None, max_names=10, max_idle=10)
    catalog.attach(
        EngineLoop(None, Scheduler(num_blocks=1, block_size=1, max_step_tokens=1, max_rows=1))
    )
    metrics.watch_adapters(catalog, lambda: AdapterCapacity(4, 0, None, 0))
    metrics.watch_fronts(lambda: [FrontUsage(2, 5, 1.5, 4096)], lambda: 3)
    return metrics


def text_of(metrics: Metrics) -> list[str]:
    return to_text(metrics.registry).decode().splitlines()


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page()


def test_every_metric_of_the_table_is_exposed_with_its_type_and_no_other():
    types = {
        line.split()[2]: line.split()[3] for line in text_of(make_metrics()) if "# TYPE" in line
    }
    assert types == {spec.name: spec.kind for spec in ALL_METRICS}


def test_counters_have_plain_names_as_in_lorax():
    metrics = make_metrics()
    metrics.request_received()
    metrics.request_failed(ValidationError("x"))
    lines = text_of(metrics)
    assert "lorax_request_count 1.0" in lines
    assert 'lorax_request_failure{err="validation"} 1.0' in lines
    ours = [line for line in lines if "vllm:" not in line]
    assert not any("_total" in line or "_created" in line for line in ours)


def test_the_scheduler_is_read_at_each_scrape():
    lines = text_of(make_metrics())
    assert "lorax_requests_running 2.0" in lines
    assert "lorax_queue_length 3.0" in lines
    assert "lorax_requests_preempted 5.0" in lines
    assert "lorax_kv_usage_ratio 0.6" in lines
    assert "lorax_batch_current_max_tokens 96.0" in lines


def test_duration_buckets_are_lorax_s():
    assert len(DURATION_BUCKETS) == 35
    assert DURATION_BUCKETS[0] == 0.00015
    assert DURATION_BUCKETS[-1] == pytest.approx(145.6, rel=1e-3)
    metrics = make_metrics()
    metrics.request_validated(seconds=0.0002, num_prompt=15, max_new_tokens=15)
    lines = text_of(metrics)
    assert 'lorax_request_validation_duration_bucket{le="0.00015"} 0.0' in lines
    assert 'lorax_request_input_length_bucket{le="10.0"} 0.0' in lines
    assert 'lorax_request_input_length_bucket{le="20.0"} 1.0' in lines
    assert 'lorax_request_max_new_tokens_bucket{le="20.0"} 1.0' in lines
    assert 'lorax_request_max_new_tokens_bucket{le="+Inf"} 1.0' in lines


def test_steps_are_counted_by_method_and_outcome():
    metrics = make_metrics()
    stats = EngineStats(0, 0, 1, 1, 0, 0)
    metrics.step_sent(num_rows=5, num_tokens=30, num_new_rows=2)
    metrics.step_sent(num_rows=2, num_tokens=30, num_new_rows=2)
    metrics.step_done(method="prefill", duration_s=0.01, ok=True, stats=stats)
    metrics.step_done(method="decode", duration_s=0.01, ok=False, stats=stats)
    lines = text_of(metrics)
    assert 'lorax_batch_inference_count{method="prefill"} 1.0' in lines
    assert 'lorax_batch_inference_success{method="prefill"} 1.0' in lines
    assert 'lorax_batch_inference_failure{method="decode"} 1.0' in lines
    assert 'lorax_batch_concat{reason="chunking"} 1.0' in lines
    assert "lorax_batch_current_size 2.0" in lines
    assert "lorax_batch_next_size_count 2.0" in lines


def test_what_a_step_costs_and_its_chunk_are_shown_once_they_are_known():
    stats = [EngineStats(0, 0, 1, 1, 0, 0)]
    metrics = Metrics(model_name="base", max_input_length=1000, max_total_tokens=2000)
    metrics.watch_engine(lambda: stats[0], 16)
    assert not [line for line in text_of(metrics) if line.startswith("lorax_step_cost_seconds{")]
    cost = LinearCost(0.5, 0.25, 0.125, 0.0625, 2.0)
    stats[0] = EngineStats(0, 0, 1, 1, 0, 0, step_cost=cost, prompt_limit=77)
    lines = text_of(metrics)
    assert "lorax_batch_prompt_limit_tokens 77.0" in lines
    for unit, price in (
        ("step", 0.5), ("token", 0.25), ("kv_token", 0.125), ("adapter_byte", 0.0625),
        ("token_rank", 2.0),
    ):  # fmt: skip
        assert f'lorax_step_cost_seconds{{unit="{unit}"}} {price}' in lines


def test_each_view_of_a_histogram_counts_like_prometheus():
    views = {
        "a": HistogramView(MetricSpec("a", "histogram", "text"), (1.0, 2.0)),
        "b": HistogramView(MetricSpec("b", "histogram", "text"), (1.2, 9.0), {"model": "m"}),
    }
    histogram = SharedHistogram(*views.values())
    for value, times in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 3)):
        histogram.observe(value, times)
    assert histogram.count == 7
    registry = CollectorRegistry()
    registry.register(histogram)
    for name, view in views.items():
        own = CollectorRegistry()
        oracle = Histogram(name, "text", [*view.labels], buckets=view.buckets, registry=own)
        oracle = oracle.labels(*view.labels.values()) if view.labels else oracle
        for value in (0.5, 1.0, 1.0, 1.5, 9.0, 9.0, 9.0):
            oracle.observe(value)
        for bound in (*map(str, view.buckets), "+Inf"):
            labels = {**view.labels, "le": bound}
            assert registry.get_sample_value(f"{name}_bucket", labels) == own.get_sample_value(
                f"{name}_bucket", labels
            )
        for suffix in ("count", "sum"):
            sample = f"{name}_{suffix}"
            labels = dict(view.labels)
            assert registry.get_sample_value(sample, labels) == own.get_sample_value(sample, labels)


def test_what_fronts_take_is_told_of_each():
    lines = text_of(make_metrics())
    assert 'lorax_front_cpu_seconds{front="2"} 1.5' in lines
    assert 'lorax_front_resident_bytes{front="2"} 4096.0' in lines
    assert 'lorax_front_connections{front="2"} 5.0' in lines
    assert "lorax_front_restarts 3.0" in lines


def test_the_json_form_has_types_and_samples():
    metrics = make_metrics()
    metrics.request_failed(OverloadedError())
    document = json.loads(to_json(metrics.registry))
    failures = document["lorax_request_failure"]
    assert failures["type"] == "counter"
    # All kinds are there before the first failure: a rate has to see it come.
    assert {each["key"]: each["value"] for each in failures["data"]} == {
        f'lorax_request_failure{{err="{label}"}}': float(label == "overloaded")
        for label in FAILURE_LABELS
    }
    assert set(document) == {spec.name for spec in ALL_METRICS}


def test_label_values_are_escaped():
    metrics = make_metrics()
    metrics.step_done(
        method='a"b\\c\nd', duration_s=0.1, ok=True, stats=EngineStats(0, 0, 1, 1, 0, 0)
    )
    assert r'lorax_batch_inference_count{method="a\"b\\c\nd"} 1.0' in text_of(metrics)


@pytest.mark.parametrize(
    ("error", "label"),
    [
        (GenerationError(), "generation"),
        (IncompleteGenerationError(), "incomplete"),
        (RuntimeError(), "internal"),
    ],
)
def test_failure_labels(error, label):
    assert failure_label(error) == label


def test_registries_are_not_shared():
    first, second = make_metrics(), make_metrics()
    first.request_received()
    assert "lorax_request_count 0.0" in text_of(second)
