"""How far the sequences of a request are."""

from __future__ import annotations

from lorax_contract.step import FinishCode
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.engine.row_cost import RowCost
from lorax_router.service.keys.meters import UNMETERED, TenantMeter
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.results import AdapterUse, Timings


class SequenceProgress:
    """How far one sequence is; counts its tokens into the metrics, if there are any."""

    __slots__ = (
        "_meter",
        "_metrics",
        "_num_prompt",
        "adapter",
        "cost",
        "finish",
        "num_cached",
        "num_generated",
        "num_skipped",
        "timings",
    )

    def __init__(
        self,
        timings: Timings,
        metrics: Metrics | None,
        adapter: AdapterUse | None = None,
        *,
        num_prompt: int = 0,
        meter: TenantMeter = UNMETERED,
    ) -> None:
        self._meter = meter
        self.timings = timings
        # Shared by the sequences of one request.
        self.adapter = adapter
        self.num_generated = 0
        # Tokens that came in a step with an earlier one.
        self.num_skipped = 0
        # Tokens of the prompt that were in the cache.
        self.num_cached = 0
        self.finish = FinishCode.RUNNING
        self._metrics = metrics
        self._num_prompt = num_prompt
        # What its row took; of the engine's counting once it is submitted.
        self.cost = RowCost()

    def take(self, chunk: TokenChunk) -> None:
        """Count a chunk. Called for each token of each stream: keep it cheap."""
        num = len(chunk.tokens.ids)
        if not num and chunk.finish in (FinishCode.RUNNING, FinishCode.ERROR):
            return
        timings, metrics = self.timings, self._metrics
        if chunk.adapter_phases is not None and self.adapter is not None:
            self.adapter.phases.update(chunk.adapter_phases)
        if not self.num_generated:
            timings.scheduled_at = chunk.scheduled_at
            self.num_cached = chunk.num_cached_tokens
            timings.first_token_at = chunk.received_at
            if metrics is not None:
                metrics.prompt_computed(
                    timings.first_token_s, num_prompt=self._num_prompt, num_tokens=num
                )
        elif num and metrics is not None:
            gap = chunk.received_at - timings.last_token_at
            metrics.observe_inter_token(gap / num, num)
        timings.last_token_at = chunk.received_at
        self.num_generated += num
        if num > 1:
            self.num_skipped += num - 1
        self._meter.generated(num)
        self.finish = chunk.finish
