"""vLLM's names for what gateways, autoscalers and dashboards read.

They stand beside our own, count the same things, and are there from the start, at 0.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from lorax_contract.step import FinishCode
from lorax_router.service.engine.port import EngineStats
from lorax_router.service.metrics.histogram import HistogramView, SharedHistogram
from lorax_router.service.metrics.spec import MetricSpec
from lorax_router.service.requests import ValidRequest
from lorax_router.service.results import Timings

# Each front end has one engine, and vLLM numbers them.
_ENGINE = "0"


def _spec(name: str, kind: str, text: str, *labels: str) -> MetricSpec:
    return MetricSpec(f"vllm:{name}", kind, text, ("engine", "model_name", *labels))


NUM_REQUESTS_RUNNING = _spec("num_requests_running", "gauge", "`lorax_requests_running`.")
NUM_REQUESTS_WAITING = _spec("num_requests_waiting", "gauge", "`lorax_requests_waiting`.")
KV_CACHE_USAGE = _spec("kv_cache_usage_perc", "gauge", "`lorax_kv_usage_ratio`, 0 to 1.")
GPU_CACHE_USAGE = _spec(
    "gpu_cache_usage_perc", "gauge", "The older name of `vllm:kv_cache_usage_perc`."
)
CACHE_CONFIG = _spec(
    "cache_config_info",
    "gauge",
    "Always 1; its labels tell how the KV cache is cut.",
    "block_size",
    "num_gpu_blocks",
)
NUM_PREEMPTIONS = _spec("num_preemptions_total", "counter", "`lorax_requests_preempted`.")
PROMPT_TOKENS = _spec(
    "prompt_tokens_total", "counter", "Tokens of prompts whose first output token is there."
)
GENERATION_TOKENS = _spec("generation_tokens_total", "counter", "Tokens generated.")
REQUEST_SUCCESS = _spec(
    "request_success_total",
    "counter",
    "Requests that ended after they were found valid: `finished_reason` is stop (a stop string, a "
    "stop token, the end of the sequence), length, abort (the client left) or error.",
    "finished_reason",
)
PREFIX_CACHE_QUERIES = _spec(
    "prefix_cache_queries_total",
    "counter",
    "Tokens of requests as they enter, again after each preemption.",
)
PREFIX_CACHE_HITS = _spec(
    "prefix_cache_hits_total", "counter", "Those of them that were in the prefix cache."
)
DRAFT_TOKENS = _spec("spec_decode_num_draft_tokens_total", "counter", "Tokens that were drafted.")
ACCEPTED_TOKENS = _spec(
    "spec_decode_num_accepted_tokens_total", "counter", "Those of them that were kept."
)
TTFT = _spec(
    "time_to_first_token_seconds", "histogram", "`lorax_request_time_to_first_token_duration`."
)
INTER_TOKEN = _spec(
    "inter_token_latency_seconds", "histogram", "`lorax_request_inter_token_duration`."
)
TIME_PER_OUTPUT_TOKEN = _spec(
    "time_per_output_token_seconds", "histogram", "The older name of the one above."
)
REQUEST_TIME_PER_OUTPUT_TOKEN = _spec(
    "request_time_per_output_token_seconds",
    "histogram",
    "Mean seconds between the tokens of a request.",
)
E2E_LATENCY = _spec("e2e_request_latency_seconds", "histogram", "`lorax_request_duration`.")
QUEUE_TIME = _spec("request_queue_time_seconds", "histogram", "`lorax_request_queue_duration`.")
INFERENCE_TIME = _spec(
    "request_inference_time_seconds", "histogram", "`lorax_request_inference_duration`."
)
PREFILL_TIME = _spec(
    "request_prefill_time_seconds",
    "histogram",
    "Seconds from the first step of a request to its first token.",
)
DECODE_TIME = _spec(
    "request_decode_time_seconds",
    "histogram",
    "Seconds from the first token of a request to its last one.",
)
REQUEST_PROMPT_TOKENS = _spec(
    "request_prompt_tokens", "histogram", "Prompt tokens of a request that was answered."
)
REQUEST_GENERATION_TOKENS = _spec(
    "request_generation_tokens", "histogram", "`lorax_request_generated_tokens`."
)
REQUEST_MAX_TOKENS = _spec(
    "request_params_max_tokens",
    "histogram",
    "Most tokens that a request which was answered could generate.",
)
REQUEST_N = _spec("request_params_n", "histogram", "Sequences of a request that was answered.")
ITERATION_TOKENS = _spec("iteration_tokens_total", "histogram", "Tokens computed in a step.")

VLLM_METRICS = tuple(value for value in list(globals().values()) if isinstance(value, MetricSpec))

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
PER_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
STEP_BUCKETS = (1.0, *(float(2**exponent) for exponent in range(3, 15)))

FINISHED_REASONS = ("stop", "length", "abort", "error")
_REASONS = {
    FinishCode.EOS_TOKEN: "stop",
    FinishCode.STOP_SEQUENCE: "stop",
    FinishCode.LENGTH: "length",
}


def one_two_five(highest: int) -> tuple[float, ...]:
    """Return 1, 2, 5, 10, 20, 50 and so on, up to ``highest``."""
    steps = (digit * 10.0**exponent for exponent in range(19) for digit in (1, 2, 5))
    return tuple(step for step in steps if step <= highest)


class VllmSeries(Collector):
    """The series of one server under vLLM's names, with vLLM's labels."""

    def __init__(self, model_name: str, max_total_tokens: int) -> None:
        self._labels = {"engine": _ENGINE, "model_name": model_name}
        # One view each of what is counted for our own names, too.
        self.ttft = self._view(TTFT, TTFT_BUCKETS)
        self.inter_token = self._view(INTER_TOKEN, PER_TOKEN_BUCKETS)
        self.time_per_output_token = self._view(TIME_PER_OUTPUT_TOKEN, PER_TOKEN_BUCKETS)
        self.e2e_latency = self._view(E2E_LATENCY, LATENCY_BUCKETS)
        self.queue_time = self._view(QUEUE_TIME, LATENCY_BUCKETS)
        self.inference_time = self._view(INFERENCE_TIME, LATENCY_BUCKETS)
        lengths = one_two_five(max_total_tokens)
        self._histograms: list[SharedHistogram] = []
        self.generation_tokens = self._view(REQUEST_GENERATION_TOKENS, lengths)
        # Counted for these names alone.
        self._per_output_token = self._own(REQUEST_TIME_PER_OUTPUT_TOKEN, PER_TOKEN_BUCKETS)
        self._prefill_time = self._own(PREFILL_TIME, LATENCY_BUCKETS)
        self._decode_time = self._own(DECODE_TIME, LATENCY_BUCKETS)
        self._prompt_tokens = self._own(REQUEST_PROMPT_TOKENS, lengths)
        self._max_tokens = self._own(REQUEST_MAX_TOKENS, lengths)
        self._n = self._own(REQUEST_N, N_BUCKETS)
        self._iteration_tokens = self._own(ITERATION_TOKENS, STEP_BUCKETS)
        self._num_prompt_tokens = 0
        self._num_first_tokens = 0
        self._ended = dict.fromkeys(FINISHED_REASONS, 0)
        self._num_later_tokens: Callable[[], int] = int
        self._stats: Callable[[], EngineStats] | None = None
        self._block_size = 0

    def watch_engine(self, stats: Callable[[], EngineStats], block_size: int) -> None:
        """Read the scheduler's state at each scrape."""
        self._stats = stats
        self._block_size = block_size

    def watch_later_tokens(self, count: Callable[[], int]) -> None:
        """Read at each scrape how many tokens came after the first of their sequence."""
        self._num_later_tokens = count

    @property
    def num_generated(self) -> int:
        """Tokens that were generated so far."""
        return self._num_first_tokens + self._num_later_tokens()

    def prompt_computed(self, *, num_prompt: int, num_tokens: int) -> None:
        """A prompt is computed, and the first tokens after it, if any, are there."""
        self._num_prompt_tokens += num_prompt
        self._num_first_tokens += num_tokens

    def succeeded(
        self, request: ValidRequest, timings: Timings, finish: FinishCode, num_generated: int
    ) -> None:
        """A request got its last token; the rest is of the sequence that is shown first."""
        self._ended[_REASONS.get(finish, "error")] += 1
        self._prefill_time.observe(timings.prefill_s)
        self._decode_time.observe(timings.decode_s)
        self._prompt_tokens.observe(request.num_prompt_tokens)
        self._max_tokens.observe(request.stopping.max_new_tokens)
        self._n.observe(len(request.samplings))
        if num_generated > 1:
            self._per_output_token.observe(timings.per_output_token_s(num_generated))

    def failed(self, error: BaseException) -> None:
        """A request that was found valid ended without its last token."""
        self._ended["abort" if isinstance(error, CancelledError) else "error"] += 1

    def step_sent(self, num_tokens: int) -> None:
        """A step was handed to the shards."""
        self._iteration_tokens.observe(num_tokens)

    def collect(self) -> Iterator[Metric]:
        """Return all but the views."""
        for histogram in self._histograms:
            yield from histogram.collect()
        yield self._series(PROMPT_TOKENS, self._num_prompt_tokens)
        yield self._series(GENERATION_TOKENS, self.num_generated)
        ended = Metric(REQUEST_SUCCESS.name, REQUEST_SUCCESS.text, REQUEST_SUCCESS.kind)
        for reason, count in self._ended.items():
            self._add(ended, count, finished_reason=reason)
        yield ended
        if self._stats is not None:
            yield from self._engine_series(self._stats())

    def _engine_series(self, stats: EngineStats) -> Iterator[Metric]:
        usage = (stats.num_blocks - stats.num_free_blocks) / max(stats.num_blocks, 1)
        yield self._series(NUM_REQUESTS_RUNNING, stats.num_running)
        yield self._series(NUM_REQUESTS_WAITING, stats.num_waiting)
        yield self._series(KV_CACHE_USAGE, usage)
        yield self._series(GPU_CACHE_USAGE, usage)
        yield self._series(NUM_PREEMPTIONS, stats.num_preemptions)
        yield self._series(PREFIX_CACHE_QUERIES, stats.num_entered_tokens)
        yield self._series(PREFIX_CACHE_HITS, stats.num_cached_tokens)
        yield self._series(DRAFT_TOKENS, stats.num_drafted_tokens)
        yield self._series(ACCEPTED_TOKENS, stats.num_accepted_tokens)
        cut = {"block_size": str(self._block_size), "num_gpu_blocks": str(stats.num_blocks)}
        yield self._series(CACHE_CONFIG, 1, **cut)

    def _series(self, spec: MetricSpec, value: float, **labels: str) -> Metric:
        # Not the client's families, which take `_total` off the names of counters.
        metric = Metric(spec.name, spec.text, spec.kind)
        self._add(metric, value, **labels)
        return metric

    def _add(self, metric: Metric, value: float, **labels: str) -> None:
        metric.add_sample(metric.name, {**self._labels, **labels}, value)

    def _view(self, spec: MetricSpec, buckets: tuple[float, ...]) -> HistogramView:
        return HistogramView(spec, buckets, self._labels)

    def _own(self, spec: MetricSpec, buckets: tuple[float, ...]) -> SharedHistogram:
        histogram = SharedHistogram(self._view(spec, buckets))
        self._histograms.append(histogram)
        return histogram
