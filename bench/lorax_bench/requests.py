"""What a run asks of a server: values that every client and every peer can carry out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One request: a prompt of token ids and how much of an answer is wanted.

    The answer has exactly ``max_tokens`` tokens: the end of the text is ignored.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    adapter: int | None = None
    """Which of the workload's adapters, from 0; None: the base model."""
    at_s: float = 0.0
    """When it is sent, in seconds from the start; where a limit on concurrency holds, not before."""
    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no server could answer."""
        if not self.prompt_ids:
            raise ValueError("`prompt_ids` must not be empty")
        if self.max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1, got {self.max_tokens}")
        if self.at_s < 0:
            raise ValueError(f"`at_s` must not be negative, got {self.at_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in the order in which they are sent, and how many run at once."""

    name: str
    requests: tuple[BenchRequest, ...]
    concurrency: int | None = None
    """A closed loop of at most so many at once; None: each is sent at its ``at_s``."""
    num_adapters: int = 0

    def __post_init__(self) -> None:
        """Refuse requests for adapters that there are not."""
        if not self.requests:
            raise ValueError(f"the workload {self.name!r} has no requests")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, got {self.concurrency}")
        used = [request.adapter for request in self.requests if request.adapter is not None]
        if used and not (min(used) >= 0 and max(used) < self.num_adapters):
            raise ValueError(
                f"requests of {self.name!r} name adapters {min(used)} to {max(used)}, "
                f"but `num_adapters` is {self.num_adapters}"
            )

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(request.max_tokens for request in self.requests)
