"""The names of all metrics of the router, and what counts into them.

Names, types and buckets that LoRAX has are LoRAX's; the others follow its style.
``docs/metrics.md`` is written from the table below.
"""

from __future__ import annotations

import contextlib
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorax_contract.adapters import AdapterUnavailableError
from lorax_contract.errors import (
    BadRequestError,
    CapacityError,
    DeadlineError,
    GenerationError,
    IncompleteGenerationError,
    OverloadedError,
    QueueFullError,
    QuotaError,
    RequestError,
    ShuttingDownError,
    TemplateError,
    UnhealthyError,
    ValidationError,
)
from lorax_contract.step import FinishCode
from lorax_router.core.adapters.table import AdapterCapacity
from lorax_router.core.cost import LinearCost
from lorax_router.service.adapters.catalog import AdapterCatalog
from lorax_router.service.adapters.metrics import (
    ADAPTER_METRICS,
    PRIVATE,
    AdapterResidency,
    AdapterUsage,
)
from lorax_router.service.engine.port import EngineStats
from lorax_router.service.metrics.front_processes import FRONT_METRICS, FrontSeries, FrontUsage
from lorax_router.service.metrics.histogram import HistogramView, SharedHistogram
from lorax_router.service.metrics.host_blocks import HOST_BLOCK_METRICS, host_block_series
from lorax_router.service.metrics.shard_losses import EPOCH, SHARDS_LOST, SHARDS_LOST_DURATION
from lorax_router.service.metrics.spec import MetricSpec
from lorax_router.service.metrics.tenants import TENANT_METRICS, TenantUsage
from lorax_router.service.metrics.vllm import VLLM_METRICS, VllmSeries
from lorax_router.service.requests import ValidRequest
from lorax_router.service.results import AdapterUse, Timings

REQUEST_COUNT = MetricSpec(
    "lorax_request_count", "counter", "Requests received, those that were refused unread too."
)
REQUEST_SUCCESS = MetricSpec("lorax_request_success", "counter", "Requests answered in full.")
REQUEST_FAILURE = MetricSpec(
    "lorax_request_failure",
    "counter",
    "Requests that failed; `err` is overloaded, queue_full (the tenant has as much waiting as it may), "
    "quota (the tenant's is used up), deadline (the client's time is over, or would be), shutting_down, validation, template, generation, "
    "download_adapter (its adapter could not be had), incomplete, unhealthy, dropped (the client left), bad_request (the body could not be read) or "
    "internal.",
    ("err",),
)
REQUEST_UNKNOWN_FIELDS = MetricSpec(
    "lorax_request_unknown_fields", "counter", "Fields in request bodies that were ignored."
)
REQUEST_DURATION = MetricSpec(
    "lorax_request_duration", "histogram", "Seconds from receipt of a request to its last token."
)
REQUEST_VALIDATION = MetricSpec(
    "lorax_request_validation_duration",
    "histogram",
    "Seconds to validate and tokenize a request, the wait for a tokenizer included.",
)
REQUEST_QUEUE = MetricSpec(
    "lorax_request_queue_duration", "histogram", "Seconds a request waited for its first step."
)
REQUEST_INFERENCE = MetricSpec(
    "lorax_request_inference_duration",
    "histogram",
    "Seconds from the first step of a request to its last token.",
)
REQUEST_MEAN_TIME_PER_TOKEN = MetricSpec(
    "lorax_request_mean_time_per_token_duration",
    "histogram",
    "Inference seconds of a request divided by its generated tokens.",
)
REQUEST_TTFT = MetricSpec(
    "lorax_request_time_to_first_token_duration",
    "histogram",
    "Seconds from receipt of a request to its first token.",
)
REQUEST_INTER_TOKEN = MetricSpec(
    "lorax_request_inter_token_duration",
    "histogram",
    "Seconds between consecutive tokens of a request.",
)
REQUEST_INPUT_LENGTH = MetricSpec(
    "lorax_request_input_length", "histogram", "Prompt tokens of a request."
)
REQUEST_GENERATED_TOKENS = MetricSpec(
    "lorax_request_generated_tokens", "histogram", "Tokens generated for a request."
)
REQUEST_MAX_NEW_TOKENS = MetricSpec(
    "lorax_request_max_new_tokens", "histogram", "Most tokens a request could generate."
)
REQUEST_SKIPPED_TOKENS = MetricSpec(
    "lorax_request_skipped_tokens", "summary", "Tokens of a request gained by speculation."
)
BATCH_COUNT = MetricSpec(
    "lorax_batch_inference_count",
    "counter",
    "Steps answered or failed; `method` is prefill (with new requests) or decode.",
    ("method",),
)
BATCH_SUCCESS = MetricSpec(
    "lorax_batch_inference_success", "counter", "Steps answered.", ("method",)
)
BATCH_FAILURE = MetricSpec(
    "lorax_batch_inference_failure", "counter", "Steps that failed.", ("method",)
)
BATCH_DURATION = MetricSpec(
    "lorax_batch_inference_duration",
    "histogram",
    "Seconds from sending a step to its answer.",
    ("method",),
)
BATCH_CONCAT = MetricSpec(
    "lorax_batch_concat",
    "counter",
    "Steps in which new requests joined running ones; `reason` is always chunking here, since "
    "prompts are computed in chunks.",
    ("reason",),
)
BATCH_NEXT_SIZE = MetricSpec(
    "lorax_batch_next_size", "histogram", "New requests in a step that has any."
)
BATCH_CURRENT_SIZE = MetricSpec(
    "lorax_batch_current_size", "gauge", "Requests in the step sent last."
)
BATCH_STEP_TOKENS = MetricSpec(
    "lorax_batch_step_tokens", "gauge", "Tokens computed in the step sent last."
)
BATCH_PROMPT_LIMIT = MetricSpec(
    "lorax_batch_prompt_limit_tokens",
    "gauge",
    "Tokens that prompts could have in the latest step with a prompt: what decodes left of the "
    "step, or the chunk that meets --target-itl-ms.",
)
STEP_COST = MetricSpec(
    "lorax_step_cost_seconds",
    "gauge",
    "What a step takes, fitted to the latest: seconds for each `unit` of work, which is step (a "
    "fixed time), token, kv_token (read from the cache), adapter_byte, token_rank (token x rank) or "
    "attended_token (token x token that it attends to).",
    ("unit",),
)
BATCH_CURRENT_MAX_TOKENS = MetricSpec(
    "lorax_batch_current_max_tokens", "gauge", "Tokens of KV cache that requests hold."
)
QUEUE_LENGTH = MetricSpec("lorax_queue_length", "gauge", "Requests waiting for their first step.")
RUNNING = MetricSpec("lorax_requests_running", "gauge", "Requests in the running batch.")
WAITING = MetricSpec(
    "lorax_requests_waiting", "gauge", "Requests waiting, preempted ones included."
)
PREEMPTED = MetricSpec(
    "lorax_requests_preempted",
    "counter",
    "Times a running request gave its KV blocks back: to be computed again later, or swapped out.",
)
KV_BLOCKS = MetricSpec("lorax_kv_blocks", "gauge", "Blocks in the KV pool.")
KV_BLOCKS_FREE = MetricSpec("lorax_kv_blocks_free", "gauge", "Blocks of the KV pool not in use.")
KV_USAGE = MetricSpec("lorax_kv_usage_ratio", "gauge", "Share of the KV pool in use, 0 to 1.")
ADAPTERS_RESOLVING = MetricSpec(
    "lorax_requests_resolving",
    "gauge",
    "Requests that wait for their adapter to be found, fetched and verified.",
)
ADAPTER_PHASE = MetricSpec(
    "lorax_adapter_cold_start_duration",
    "histogram",
    "Seconds that a request spent on its adapter's way to the shards; `phase` is resolve, "
    "download, verify, wait (for a slot), parse or copy.",
    ("phase",),
)

ALL_METRICS = (
    *(value for value in list(globals().values()) if isinstance(value, MetricSpec)),
    *HOST_BLOCK_METRICS,
    *ADAPTER_METRICS,
    *FRONT_METRICS,
    *TENANT_METRICS,
    *VLLM_METRICS,
)

# 0.00015 s to 145.6 s in 35 steps of 1.5.
DURATION_BUCKETS = tuple(0.00015 * 1.5**exponent for exponent in range(35))
BATCH_SIZE_BUCKETS = tuple(float(2**exponent) for exponent in range(11))


def linear_buckets(highest: int) -> tuple[float, ...]:
    """A hundred equal steps up to ``highest``."""
    return tuple(highest * step / 100 for step in range(1, 101))


class Metrics:
    """The metrics of one router, in a registry of their own; implements StepObserver."""

    def __init__(
        self,
        *,
        model_name: str,
        max_input_length: int,
        max_total_tokens: int,
        max_adapter_labels: int = 50,
    ) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._model_name = model_name
        self._vllm = vllm = VllmSeries(model_name, max_total_tokens)
        self.registry.register(vllm)
        self._request_count = self._counter(REQUEST_COUNT)
        self._request_success = self._counter(REQUEST_SUCCESS)
        self._request_failure = self._counter(REQUEST_FAILURE)
        self._batch_failure = self._counter(BATCH_FAILURE)
        # From the beginning: of a series that comes with its first failure, rate() sees no rise.
        for label in FAILURE_LABELS:
            self._request_failure.labels(label)
        for method in ("prefill", "decode"):
            self._batch_failure.labels(method)
        self._unknown_fields = self._counter(REQUEST_UNKNOWN_FIELDS)
        self._duration = self._shared(REQUEST_DURATION, DURATION_BUCKETS, vllm.e2e_latency)
        self._validation = self._shared(REQUEST_VALIDATION, DURATION_BUCKETS)
        self._queue = self._shared(REQUEST_QUEUE, DURATION_BUCKETS, vllm.queue_time)
        self._inference = self._shared(REQUEST_INFERENCE, DURATION_BUCKETS, vllm.inference_time)
        self._per_token = self._shared(REQUEST_MEAN_TIME_PER_TOKEN, DURATION_BUCKETS)
        self._ttft = self._shared(REQUEST_TTFT, DURATION_BUCKETS, vllm.ttft)
        inter_token = self._shared(
            REQUEST_INTER_TOKEN, DURATION_BUCKETS, vllm.inter_token, vllm.time_per_output_token
        )
        vllm.watch_later_tokens(lambda: inter_token.count)
        # Called for each token of each stream: handed out without a layer in between.
        self.observe_inter_token = inter_token.observe
        self._input_length = self._shared(REQUEST_INPUT_LENGTH, linear_buckets(max_input_length))
        by_total = linear_buckets(max_total_tokens)
        self._generated = self._shared(REQUEST_GENERATED_TOKENS, by_total, vllm.generation_tokens)
        self._max_new = self._shared(REQUEST_MAX_NEW_TOKENS, by_total)
        self._skipped = Summary(
            REQUEST_SKIPPED_TOKENS.name, REQUEST_SKIPPED_TOKENS.text, registry=self.registry
        )
        self._usage = AdapterUsage(max_adapter_labels)
        # Told of each request of a tenant that ended.
        self.tenants = TenantUsage(self.registry)
        self._resolving = self._gauge(ADAPTERS_RESOLVING)
        self._adapter_phase = self._histogram(ADAPTER_PHASE, DURATION_BUCKETS)
        self._batch_count = self._counter(BATCH_COUNT)
        self._batch_success = self._counter(BATCH_SUCCESS)
        self._batch_duration = self._histogram(BATCH_DURATION, DURATION_BUCKETS)
        self._shards_lost = self._counter(SHARDS_LOST)
        self._lost_duration = self._histogram(SHARDS_LOST_DURATION, DURATION_BUCKETS)
        self._batch_concat = self._counter(BATCH_CONCAT)
        self._next_size = self._histogram(BATCH_NEXT_SIZE, BATCH_SIZE_BUCKETS)
        self._current_size = self._gauge(BATCH_CURRENT_SIZE)
        self._step_tokens = self._gauge(BATCH_STEP_TOKENS)

    def watch_engine(
        self, stats: Callable[[], EngineStats], block_size: int, block_bytes: int = 0
    ) -> None:
        """Read the scheduler's state at each scrape, so that an idle server shows no old one."""
        collector = _EngineCollector(stats, block_size, block_bytes, self.tenants)
        self.registry.register(collector)
        self._vllm.watch_engine(stats, block_size)

    def watch_adapters(
        self, catalog: AdapterCatalog, capacity: Callable[[], AdapterCapacity]
    ) -> None:
        """Read where adapters stand at each scrape, and count what each is used for."""
        self.registry.register(self._usage)
        residency = AdapterResidency(catalog, self._usage, capacity, model_name=self._model_name)
        self.registry.register(residency)

    def watch_fronts(
        self, usages: Callable[[], Iterable[FrontUsage]], num_restarts: Callable[[], int]
    ) -> None:
        """Read at each scrape what the processes take that speak HTTP for this one."""
        self.registry.register(FrontSeries(usages, num_restarts))

    @property
    def num_generated(self) -> int:
        """Tokens that were generated so far."""
        return self._vllm.num_generated

    # --- requests ---------------------------------------------------------------

    def request_received(self) -> None:
        """A request reached the service."""
        self._request_count.inc()

    def request_validated(self, *, seconds: float, num_prompt: int, max_new_tokens: int) -> None:
        """A request was found valid and has tokens."""
        self._validation.observe(seconds)
        self._input_length.observe(num_prompt)
        self._max_new.observe(max_new_tokens)

    def prompt_computed(self, seconds: float, *, num_prompt: int, num_tokens: int) -> None:
        """A prompt is computed, and its first tokens, if any are asked for, are there.

        ``seconds`` after the receipt of the request.
        """
        if num_tokens:
            self._ttft.observe(seconds)
        self._vllm.prompt_computed(num_prompt=num_prompt, num_tokens=num_tokens)

    def request_succeeded(
        self,
        request: ValidRequest,
        *,
        timings: Timings,
        finish: FinishCode,
        num_generated: int,
        num_of_first: int,
        num_skipped: int,
    ) -> None:
        """A request got its last token, or its prompt was computed and none was asked for.

        ``timings``, ``finish`` and ``num_of_first`` tokens are those of the sequence that is
        shown first.
        """
        self._request_success.inc()
        self._duration.observe(timings.total_s)
        self._queue.observe(timings.queue_s)
        self._inference.observe(timings.inference_s)
        if num_generated:
            self._per_token.observe(timings.per_token_s(num_generated))
        self._generated.observe(num_generated)
        self._skipped.observe(num_skipped)
        self._vllm.succeeded(request, timings, finish, num_of_first)

    def request_failed(
        self, error: BaseException, *, was_valid: bool = False, tenant: str = ""
    ) -> None:
        """A request ended without its last token."""
        self._request_failure.labels(failure_label(error)).inc()
        if isinstance(error, CapacityError | DeadlineError):
            self.tenants.rejected(tenant, failure_label(error))
        if was_valid:
            self._vllm.failed(error)

    def request_refused(self, error: BaseException, tenant: str = "") -> None:
        """A request did not reach the service: there was no place, or its body was at fault."""
        self.request_received()
        self.request_failed(error, tenant=tenant)

    def unknown_fields(self, count: int) -> None:
        """A request body had so many fields that nobody reads."""
        if count:
            self._unknown_fields.inc(count)

    # --- adapters ---------------------------------------------------------------

    @contextlib.contextmanager
    def resolving(self) -> Iterator[None]:
        """Within, a request waits for its adapter to be found, fetched and verified."""
        self._resolving.inc()
        try:
            yield
        finally:
            self._resolving.dec()

    def adapter_used(self, use: AdapterUse, num_generated: int, *, failed: bool) -> None:
        """A request with an adapter ended."""
        label = PRIVATE if use.is_private else use.label
        self._usage.ended(label, was_found=use.was_found, num_tokens=num_generated, failed=failed)
        if not failed:
            for phase, seconds in use.phases.items():
                self._adapter_phase.labels(phase).observe(seconds)

    # --- steps ------------------------------------------------------------------

    def step_sent(self, *, num_rows: int, num_tokens: int, num_new_rows: int) -> None:
        """A step was handed to the shards."""
        self._current_size.set(num_rows)
        self._step_tokens.set(num_tokens)
        self._vllm.step_sent(num_tokens)
        if num_new_rows:
            self._next_size.observe(num_new_rows)
            if num_rows > num_new_rows:
                self._batch_concat.labels("chunking").inc()

    def step_done(self, *, method: str, duration_s: float, ok: bool, stats: EngineStats) -> None:
        """A step was answered or failed."""
        self._batch_count.labels(method).inc()
        outcome = self._batch_success if ok else self._batch_failure
        outcome.labels(method).inc()
        self._batch_duration.labels(method).observe(duration_s)

    def shards_lost(self) -> None:
        """The shards are gone."""
        self._shards_lost.inc()

    def shards_back(self, seconds: float) -> None:
        """Others have taken their place."""
        self._lost_duration.observe(seconds)

    def _counter(self, spec: MetricSpec) -> Counter:
        return Counter(spec.name, spec.text, spec.labels, registry=self.registry)

    def _gauge(self, spec: MetricSpec) -> Gauge:
        return Gauge(spec.name, spec.text, spec.labels, registry=self.registry)

    def _shared(
        self, spec: MetricSpec, buckets: tuple[float, ...], *others: HistogramView
    ) -> SharedHistogram:
        histogram = SharedHistogram(HistogramView(spec, buckets), *others)
        self.registry.register(histogram)
        return histogram

    def _histogram(self, spec: MetricSpec, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(spec.name, spec.text, spec.labels, registry=self.registry, buckets=buckets)


class _EngineCollector(Collector):
    """Turns a snapshot of the scheduler into metrics when somebody looks."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        block_size: int,
        block_bytes: int,
        tenants: TenantUsage,
    ) -> None:
        self._stats = stats
        self._block_size = block_size
        self._block_bytes = block_bytes
        self._tenants = tenants

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        used = stats.num_blocks - stats.num_free_blocks
        gauges = (
            (QUEUE_LENGTH, stats.num_waiting),
            (RUNNING, stats.num_running),
            (WAITING, stats.num_waiting),
            (KV_BLOCKS, stats.num_blocks),
            (KV_BLOCKS_FREE, stats.num_free_blocks),
            (KV_USAGE, used / max(stats.num_blocks, 1)),
            (BATCH_CURRENT_MAX_TOKENS, used * self._block_size),
            (BATCH_PROMPT_LIMIT, stats.prompt_limit),
            (EPOCH, stats.epoch),
        )
        for spec, value in gauges:
            yield GaugeMetricFamily(spec.name, spec.text, value=value)
        prices = GaugeMetricFamily(STEP_COST.name, STEP_COST.text, labels=STEP_COST.labels)
        for unit, price in _step_prices(stats.step_cost):
            prices.add_metric([unit], price)
        yield prices
        yield CounterMetricFamily(PREEMPTED.name, PREEMPTED.text, value=stats.num_preemptions)
        yield from self._tenants.depths(stats.queue_depths)
        yield from host_block_series(stats.host, self._block_bytes)


def _step_prices(cost: LinearCost | None) -> list[tuple[str, float]]:
    """Return what the units of work cost; nothing while it is not known."""
    if cost is None:
        return []
    return [
        ("step", cost.fixed_s), ("token", cost.token_s), ("kv_token", cost.kv_token_s),
        ("adapter_byte", cost.adapter_byte_s), ("token_rank", cost.token_rank_s),
        ("attended_token", cost.attended_s),
    ]  # fmt: skip


_FAILURE_LABELS: tuple[tuple[type[BaseException], str], ...] = (
    (AdapterUnavailableError, "download_adapter"),
    (OverloadedError, "overloaded"),
    (QueueFullError, "queue_full"),
    (DeadlineError, "deadline"),
    (QuotaError, "quota"),
    (ShuttingDownError, "shutting_down"),
    (ValidationError, "validation"),
    (TemplateError, "template"),
    (BadRequestError, "bad_request"),
    (GenerationError, "generation"),
    (IncompleteGenerationError, "incomplete"),
    (UnhealthyError, "unhealthy"),
    (CancelledError, "dropped"),
    # The model is none, or the request is at fault in some other way.
    (RequestError, "validation"),
)
# Each once, as they come.
FAILURE_LABELS = tuple(dict.fromkeys([label for _, label in _FAILURE_LABELS] + ["internal"]))


def failure_label(error: BaseException) -> str:
    """The ``err`` label of an error."""
    return next((label for kind, label in _FAILURE_LABELS if isinstance(error, kind)), "internal")
