"""The seam between the inference service and the engine loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, Self, TypeAlias

from lorax_contract.errors import LoraxError
from lorax_contract.step import (
    AdapterHandle,
    Alternatives,
    FinishCode,
    RequestId,
    RequestSpec,
    TokenColumns,
)
from lorax_router.core.adapters.table import AdapterRecord
from lorax_router.core.request import ANY_TERMS, RequestTerms
from lorax_router.core.stats import SchedulerStats as EngineStats
from lorax_router.service.engine.row_cost import RowCost

__all__ = [
    "AdapterEngine",
    "ChunkSink",
    "EnginePort",
    "EngineStats",
    "StepObserver",
    "TokenChunk",
    "TokenStream",
]


@dataclass(slots=True)
class TokenChunk:
    """New tokens of one request, in order; the last chunk's ``finish`` is not RUNNING.

    A request that asks for no tokens has one chunk, without any.
    """

    tokens: TokenColumns
    finish: FinishCode = FinishCode.RUNNING
    # One entry per token, when the request asked for alternatives.
    alternatives: list[Alternatives] = field(default_factory=list)
    # The whole output without special tokens; in the last chunk only.
    generated_text: str | None = None
    # Logprobs of the prompt, when asked for; in the first chunk only.
    prompt_tokens: TokenColumns | None = None
    # One entry per prompt token, the first one empty, when asked for; in the first chunk only.
    prompt_alternatives: list[Alternatives] = field(default_factory=list)
    # What was asked for instead of tokens, as RowDetail has it; in the last chunk only.
    vector: bytes | None = None
    # Why the request failed; set when finish is ERROR.
    error: LoraxError | None = None
    # perf_counter time at which the tokens arrived from the shards.
    received_at: float = 0.0
    # perf_counter time at which the request was first scheduled (same in every chunk).
    scheduled_at: float = 0.0
    # Tokens that were in the cache when it was (same in every chunk).
    num_cached_tokens: int = 0
    # Seconds that the request's adapter took to come to the shards, by phase (wait, parse,
    # copy); in the first chunk only, None when it was there already.
    adapter_phases: dict[str, float] | None = None


# Takes a chunk as it comes; must not wait.
ChunkSink: TypeAlias = Callable[[TokenChunk], None]


class TokenStream(Protocol):
    """The chunks of one request; one consumer, which closes it when it stops reading."""

    @property
    def cost(self) -> RowCost:
        """What it took so far; the same object at any time."""

    def __aiter__(self) -> Self:
        """Return itself."""

    async def __anext__(self) -> TokenChunk:
        """Return the next chunk; StopAsyncIteration after the last one."""

    def hand_to(self, sink: ChunkSink) -> None:
        """Let chunks that are not the last one be handed to ``sink`` as they come.

        That spares waking the reader for each. It gets those that are not handed over, the last
        one always, and what the sink raises. Those that it has not read yet come first: it is to
        be done with one when it asks for the next.
        """

    async def aclose(self) -> None:
        """Cancel the request unless it has finished, also when nothing was read yet."""


class StepObserver(Protocol):
    """Told about each step by the engine loop; metrics implement it."""

    def step_sent(self, *, num_rows: int, num_tokens: int, num_new_rows: int) -> None:
        """A step was handed to the shards."""

    def step_done(self, *, method: str, duration_s: float, ok: bool, stats: EngineStats) -> None:
        """A step was answered; ``method`` is ``prefill`` (new rows) or ``decode``."""

    def shards_lost(self) -> None:
        """The shards are gone."""

    def shards_back(self, seconds: float) -> None:
        """Others have taken their place, so many seconds later."""


class AdapterEngine(Protocol):
    """What the directory of adapters sees of the engine loop."""

    def add_adapter(
        self, handle: AdapterHandle, nbytes: int, content: str = "", rank: int = 0
    ) -> None:
        """Make an adapter known; ValidationError if it can never be resident.

        ``content`` is equal for adapters that compute the same; "": no other does.
        """

    async def load_adapter(self, handle: AdapterHandle, *, pin: bool = False) -> None:
        """Have an adapter on the shards; returns when it is, raises why it is not."""

    def pin_adapter(self, handle: AdapterHandle) -> None:
        """Keep an adapter on the shards; ValidationError when others would have no room left."""

    def unpin_adapter(self, handle: AdapterHandle) -> None:
        """Let an adapter be evicted again."""

    async def retire_adapter(self, handle: AdapterHandle) -> None:
        """Let an adapter go for good; returns when its last request is done and it is freed."""

    def is_adapter_resident(self, handle: AdapterHandle) -> bool:
        """Whether an adapter is on the shards, ready for requests."""

    def adapter_record(self, handle: AdapterHandle) -> AdapterRecord | None:
        """Return what the scheduler knows of an adapter; not to be changed."""

    def adapters_in_play(self) -> list[AdapterRecord]:
        """Return the adapters that are on the shards, come, go or are waited for."""


class EnginePort(Protocol):
    """What the inference service sees of the engine loop."""

    def new_request_id(self) -> RequestId:
        """Return an id never used before in this process."""

    def submit(self, spec: RequestSpec, terms: RequestTerms = ANY_TERMS) -> TokenStream:
        """Queue a request and return its stream; closing the stream cancels the request.

        Raises at once ValidationError when the request can never fit, QueueFullError or
        BusyError when too much waits, DeadlineError when it would be too late.
        """

    def check_place(
        self, terms: RequestTerms, *, num_requests: int = 1, num_tokens: int = 0
    ) -> None:
        """Raise what requests would get from the queue that come together now."""

    def stats(self) -> EngineStats:
        """Return a snapshot."""

    async def health(self) -> None:
        """Raise UnhealthyError when the shards do not answer or the loop has ended."""
