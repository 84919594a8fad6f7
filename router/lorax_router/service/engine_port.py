"""The seam between the inference service and the engine loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, Self

from lorax_contract.errors import LoraxError
from lorax_contract.step import Alternatives, FinishCode, RequestId, RequestSpec, TokenColumns
from lorax_router.core.scheduler import SchedulerStats as EngineStats

__all__ = ["Engine", "EngineStats", "StepObserver", "TokenChunk", "TokenStream"]


@dataclass(slots=True)
class TokenChunk:
    """New tokens of one request, in order; the last chunk's ``finish`` is not RUNNING."""

    tokens: TokenColumns
    finish: FinishCode = FinishCode.RUNNING
    # One entry per token, when the request asked for alternatives.
    alternatives: list[Alternatives] = field(default_factory=list)
    # The whole output without special tokens; in the last chunk only.
    generated_text: str | None = None
    # Logprobs of the prompt, when asked for; in the first chunk only.
    prompt_tokens: TokenColumns | None = None
    # Why the request failed; set when finish is ERROR.
    error: LoraxError | None = None
    # perf_counter time at which the tokens arrived from the shards.
    received_at: float = 0.0
    # perf_counter time at which the request was first scheduled (same in every chunk).
    scheduled_at: float = 0.0


class TokenStream(Protocol):
    """The chunks of one request; one consumer, which closes it when it stops reading."""

    def __aiter__(self) -> Self:
        """Return itself."""

    async def __anext__(self) -> TokenChunk:
        """Return the next chunk; StopAsyncIteration after the last one."""

    async def aclose(self) -> None:
        """Cancel the request unless it has finished, also when nothing was read yet."""


class StepObserver(Protocol):
    """Told about each step by the engine loop; metrics implement it."""

    def step_sent(self, *, num_rows: int, num_tokens: int, num_new_rows: int) -> None:
        """A step was handed to the shards."""

    def step_done(self, *, method: str, duration_s: float, ok: bool, stats: EngineStats) -> None:
        """A step was answered; ``method`` is ``prefill`` (new rows) or ``decode``."""


class Engine(Protocol):
    """What the inference service sees of the engine loop."""

    def new_request_id(self) -> RequestId:
        """Return an id never used before in this process."""

    def submit(self, spec: RequestSpec) -> TokenStream:
        """Queue a request and return its stream; closing the stream cancels the request.

        Raises ValidationError at once when the request can never fit.
        """

    def stats(self) -> EngineStats:
        """Return a snapshot."""

    async def health(self) -> None:
        """Raise UnhealthyError when the shards do not answer or the loop has ended."""
