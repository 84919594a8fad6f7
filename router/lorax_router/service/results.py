"""What a front end gets back: generated sequences and what they took."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_contract.pooling import HeadFacts
from lorax_contract.step import Alternatives, FinishCode, TokenColumns
from lorax_router.service.chat.output_parser import NewParser
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.prompts.encoding import Span

FINISH_REASONS = {
    FinishCode.LENGTH: "length",
    FinishCode.EOS_TOKEN: "eos_token",
    FinishCode.STOP_SEQUENCE: "stop_sequence",
}

# What a cold start is made of, in order: find out what the name leads to, fetch its files,
# check them, wait for a slot, read them, copy them to the device.
ADAPTER_PHASES = ("resolve", "download", "verify", "wait", "parse", "copy")


@dataclass(slots=True)
class Sequence:
    """One generated sequence, complete."""

    seed: int | None
    tokens: TokenColumns = field(default_factory=TokenColumns)
    alternatives: list[Alternatives] = field(default_factory=list)
    prompt_tokens: TokenColumns | None = None
    prompt_alternatives: list[Alternatives] = field(default_factory=list)
    generated_text: str = ""
    # float32, little-endian: a vector, or what a classification head gives; None: neither was
    # asked for.
    vector: bytes | None = None
    finish: FinishCode = FinishCode.RUNNING

    @property
    def chunk(self) -> TokenChunk:
        """The whole of it as the one chunk of its stream."""
        return TokenChunk(
            self.tokens,
            self.finish,
            self.alternatives,
            self.generated_text,
            self.prompt_tokens,
            self.prompt_alternatives,
            self.vector,
        )

    def take(self, chunk: TokenChunk) -> None:
        """Add what a chunk of its stream has."""
        tokens = self.tokens
        tokens.ids += chunk.tokens.ids
        tokens.logprobs += chunk.tokens.logprobs
        tokens.texts += chunk.tokens.texts
        tokens.special += chunk.tokens.special
        self.alternatives += chunk.alternatives
        if chunk.prompt_tokens is not None:
            self.prompt_tokens = chunk.prompt_tokens
            self.prompt_alternatives = chunk.prompt_alternatives
        self.finish = chunk.finish
        self.generated_text = chunk.generated_text or ""
        self.vector = chunk.vector

    @property
    def num_generated(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens.ids)

    @property
    def finish_reason(self) -> str:
        """The name of the reason, as clients know it."""
        return FINISH_REASONS[self.finish]

    @property
    def logprob(self) -> float:
        """Log probability of the whole sequence."""
        return sum(self.tokens.logprobs)


def shown_numbers(sequences: list[Sequence], num_returned: int | None) -> list[int]:
    """Return which sequences the client gets, in their order; the likeliest first where it chose none."""
    numbers = list(range(len(sequences)))
    if num_returned == len(numbers):
        return numbers
    numbers.sort(key=lambda number: sequences[number].logprob, reverse=True)
    return numbers[:num_returned]


@dataclass(slots=True)
class Timings:
    """The moments of one request, as perf_counter seconds; 0 where it did not get."""

    received_at: float
    # Seconds of the time until then that went into finding and fetching an adapter.
    resolving_s: float = 0.0
    validated_at: float = 0.0
    scheduled_at: float = 0.0
    # Where no token is asked for, when the prompt was computed.
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def validation_s(self) -> float:
        """Seconds until the request was valid and tokenized, its adapter's way apart."""
        return max(_between(self.received_at, self.validated_at) - self.resolving_s, 0.0)

    @property
    def queue_s(self) -> float:
        """Seconds from there to the first step."""
        return _between(self.validated_at, self.scheduled_at)

    @property
    def inference_s(self) -> float:
        """Seconds from the first step to the last token."""
        return _between(self.scheduled_at, self.last_token_at)

    @property
    def first_token_s(self) -> float:
        """Seconds from receipt to the first token."""
        return _between(self.received_at, self.first_token_at)

    @property
    def prefill_s(self) -> float:
        """Seconds from the first step to the first token."""
        return _between(self.scheduled_at, self.first_token_at)

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last one."""
        return _between(self.first_token_at, self.last_token_at)

    @property
    def total_s(self) -> float:
        """Seconds from receipt to the last token."""
        return _between(self.received_at, self.last_token_at)

    def per_token_s(self, num_generated: int) -> float:
        """Mean inference seconds of a token."""
        return self.inference_s / max(num_generated, 1)

    def per_output_token_s(self, num_generated: int) -> float:
        """Mean seconds between tokens after the first one."""
        return self.decode_s / max(num_generated - 1, 1)


# PEFT computes such a prompt, too.
NOT_INVOKED = (
    "the prompt has none of the adapter's invocation tokens, so the base model answers; "
    "end the prompt with the text that invokes the adapter"
)


@dataclass(slots=True)
class AdapterUse:
    """The adapter that a request wants, and what its way here took."""

    # As headers have it: of a merge all ids.
    id: str
    source: str
    # As lists and metrics have it.
    label: str
    # Whether it exists and may be used; whether others may not learn of it.
    was_found: bool = False
    is_private: bool = False
    # Why it does not do what it was made for, if something about the request keeps it from that.
    warning: str = ""
    # Seconds by phase, in ADAPTER_PHASES; those that did not happen are absent.
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """The answer to a request that was not streamed; the best sequence first."""

    sequences: tuple[Sequence, ...]
    # The text for the client, with the prompt in front when it asked for that.
    texts: tuple[str, ...]
    details: bool
    num_prompt_chars: int
    # As ValidRequest has it.
    new_parser: NewParser
    num_prompt_tokens: int
    # Of these, those that were in the cache.
    num_cached_tokens: int = 0
    # Output tokens that came in a step with an earlier one.
    num_skipped_tokens: int = 0
    timings: Timings
    adapter: AdapterUse | None = None
    # What gave the scores, where they were asked for; of one that classifies tokens also, by token,
    # from which character of the text to which it stands.
    head: HeadFacts | None = None
    spans: list[Span] | None = None


def _between(start: float, end: float) -> float:
    return max(end - start, 0.0) if start and end else 0.0
