"""What a front end for HTTP asks of whoever generates, in this process or in another one.

``InferenceService`` is the one that does it; ``RemoteService`` asks one in another process.
Cancelling a call cancels what it asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from lorax_contract.errors import LoraxError
from lorax_contract.pooling import HeadFacts
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.chat.output_parser import NewParser
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.origin import NOWHERE, Origin
from lorax_router.service.requests import GenerateRequest
from lorax_router.service.results import AdapterUse, GenerateResult, Timings


def ignore_adapter(use: AdapterUse) -> None:
    """Hear of an adapter and do nothing."""


class AskedRequest(Protocol):
    """What the words of an answer depend on, of the request that it is to."""

    @property
    def num_sequences(self) -> int:
        """How many sequences are generated."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt that are computed, after truncation."""

    @property
    def details(self) -> bool:
        """Whether details of the output are shown."""

    @property
    def new_parser(self) -> NewParser:
        """Makes what reads one answer."""

    @property
    def return_full_text(self) -> bool:
        """Whether the client gets the prompt in front of the output."""

    def full_text(self, generated_text: str) -> str:
        """Return the text that the client gets: with the prompt when it asked for it."""


class AnswerStream(Protocol):
    """The chunks of one streamed request as (sequence, chunk); see GenerationStream."""

    @property
    def request(self) -> AskedRequest:
        """What is answered."""

    @property
    def seed(self) -> int | None:
        """The seed to report; None: none was used."""

    def seed_of(self, sequence: int) -> int | None:
        """Return the seed of a sequence to report; None: none was used."""

    @property
    def timings(self) -> Timings:
        """What the first sequence took so far; from another process once all is done."""

    @property
    def adapter(self) -> AdapterUse | None:
        """The adapter that it uses, and what that one's way took; known when timings are."""

    @property
    def adapter_content(self) -> str:
        """What the adapter is that it uses; "": none. See Resumption."""

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, of all sequences."""

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that were in the cache; 0 before the first token."""

    @property
    def num_skipped(self) -> int:
        """Output tokens that came in a step with an earlier one so far."""

    @property
    def is_done(self) -> bool:
        """Whether each sequence has had its last chunk."""

    def hand_to(self, sink: Callable[[int, TokenChunk], None]) -> None:
        """Let chunks be handed to ``sink`` as they come, as TokenStream says."""

    def __aiter__(self) -> Self:
        """Return itself."""

    async def __anext__(self) -> tuple[int, TokenChunk]:
        """Return the next chunk; raises the error of the request."""

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""

    async def __aenter__(self) -> Self:
        """Return itself."""

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the stream."""


class GenerationService(Protocol):
    """Generates for one front end."""

    async def ask_room(self, caller: Caller) -> None:
        """Raise what a request of one sequence would get at once, whatever is in it."""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Return the whole answer."""

    async def generate_through(
        self, request: GenerateRequest, adapters: Sequence[str]
    ) -> list[GenerateResult | LoraxError]:
        """Return the whole answer through each adapter, or what is wrong with it, in their order.

        What is wrong with one ends no other.
        """

    async def generate_stream(
        self, request: GenerateRequest, on_adapter: Callable[[AdapterUse], None] = ignore_adapter
    ) -> AnswerStream:
        """Admit a request and return its chunks; the caller closes the stream.

        ``on_adapter`` hears of the adapter that it uses before it is waited for.
        """

    async def count_tokens(self, request: GenerateRequest) -> int:
        """Return how many tokens a prompt has for its model; nothing is generated."""

    async def head_of(self, request: GenerateRequest) -> HeadFacts | None:
        """Return the head that would classify a request's text; None: there is none."""


class RequestCounts(Protocol):
    """Counts what is known of requests before the service has them; ``RequestLedger`` does it."""

    def request_refused(
        self, error: BaseException, caller: Caller = ANYBODY, origin: Origin = NOWHERE
    ) -> None:
        """A request ended before the service had it."""

    def unknown_fields(self, count: int) -> None:
        """A body had so many fields that nobody reads."""
