"""What a client saw of one request."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Record:
    """When a request was sent and when each token of its answer came; what went wrong if it did.

    All times are seconds on one clock, whose zero is the start of the run.
    """

    request: int
    """Its place among the workload's requests."""
    adapter: int | None = None
    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    """One for each token; tokens that came together have the same."""
    token_ids: list[int] = field(default_factory=list)
    """Empty where the server does not say them."""
    texts: list[str] = field(default_factory=list)
    """The pieces of the answer as they came; a piece may be of several tokens."""
    prompt_tokens: int = 0
    error: str | None = None
    """Why the request failed, in words; None: it has all its tokens."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer that came."""
        return len(self.token_times_s)

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None if there is none."""
        return self.token_times_s[0] - self.sent_s if self.token_times_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens, one fewer than tokens."""
        return [later - earlier for earlier, later in itertools.pairwise(self.token_times_s)]

    @property
    def end_to_end_s(self) -> float | None:
        """Time to the last token; None if there is none."""
        return self.token_times_s[-1] - self.sent_s if self.token_times_s else None
