"""Shortest job first, by lengths that are learned, with ageing."""

from __future__ import annotations

from lorax_router.core.policies.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT
from lorax_router.core.policies.lengths import OutputLengths
from lorax_router.core.policies.ranked import MAX_BYPASSES, FirstComeFirstServed
from lorax_router.core.request import RequestState

# What a second of waiting makes up for, in weighted tokens.
AGEING = 50.0


class ShortestFirst(FirstComeFirstServed):
    """The smallest expected work first; each second of waiting makes a request smaller.

    Ageing makes the order one of fixed ranks: work + AGEING * arrival. A request of ``w``
    weighted tokens more than another goes first all the same if it came ``w / AGEING``
    seconds earlier: that bounds what it is overtaken by.
    """

    keeps_order = False

    def __init__(self, *, max_bypasses: int = MAX_BYPASSES, ageing: float = AGEING) -> None:
        super().__init__(max_bypasses=max_bypasses)
        self._ageing = ageing
        self._lengths = OutputLengths()

    def push(self, request: RequestState) -> None:
        """Rank by what it is expected to take; a preempted one keeps its rank."""
        if not request.num_preemptions:
            spec = request.spec
            output = self._lengths.predict(spec.adapter, spec.stopping.max_new_tokens)
            work = PROMPT_WEIGHT * len(spec.prompt_ids) + OUTPUT_WEIGHT * output
            request.rank = work + self._ageing * request.submitted_at
        super().push(request)

    def ended(self, request: RequestState) -> None:
        """Learn from it."""
        self._lengths.observe(request.spec.adapter, len(request.output_ids))
