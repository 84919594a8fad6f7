"""Which rows give way to a tenant or an adapter that has less, and how much that may cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from math import inf

from lorax_router.core.request import RequestState, rank_of

# A request that gave way so often is left alone by those who wait.
MAX_DISPLACEMENTS = 3
# Of what is served, as it is charged, so much may be lost to those whom others give way to, as
# tokens of prompts: it is computed again like one.
LOSS_SHARE = 0.05
# Saved up is at most that part of what all that run have computed.
MAX_SAVED = 0.5
# Those who have something already may spend only what goes beyond that part of it.
AMPLE = 0.25
# How much more than whoever takes rows others keep of what they hold.
LEAD = 2.5


class LossAllowance:
    """Tokens that may be computed again for the sake of those whom others give way to."""

    def __init__(self) -> None:
        # What runs first says how much.
        self._saved = self._most = inf

    def earn(self, amount: float) -> None:
        """So much was served."""
        self._saved += LOSS_SHARE * amount

    def spend(self, num_tokens: int) -> None:
        """Some will be computed again."""
        self._saved -= num_tokens

    def look(self, running: Collection[RequestState]) -> None:
        """Let go of what is too much to be saved beside what runs now."""
        self._most = MAX_SAVED * sum(each.num_computed for each in running)
        self._saved = min(self._saved, self._most)

    @property
    def is_left(self) -> bool:
        """Whether something may be lost."""
        return self._saved > 0

    @property
    def is_ample(self) -> bool:
        """Whether so much is saved that those who have something already may take of it."""
        return self._saved > AMPLE * self._most


def beyond_the_first(
    running: Sequence[RequestState], group: Callable[[RequestState], Hashable]
) -> list[RequestState]:
    """Return all but the oldest of each group."""
    seen: set[Hashable] = set()
    others = []
    for request in sorted(running, key=rank_of):
        if group(request) in seen:
            others.append(request)
        seen.add(group(request))
    return others


def held_by_tenant(running: Collection[RequestState]) -> dict[str, float]:
    """Return the tokens of each tenant's rows, by weight."""
    held: dict[str, float] = {}
    for each in running:
        name = each.terms.tenant
        held[name] = held.get(name, 0.0) + each.num_tokens / each.terms.weight
    return held


def is_below_others(request: RequestState, running: Sequence[RequestState]) -> bool:
    """Whether the request's tenant would hold far less with it than some other one does."""
    held = held_by_tenant(running)
    own = held.pop(request.terms.tenant, 0.0) + request.num_tokens / request.terms.weight
    return LEAD * own <= max(held.values(), default=0.0)


def beyond_twice_the_share(
    request: RequestState, running: Sequence[RequestState]
) -> Iterator[RequestState]:
    """Return rows of tenants that hold, by weight, far more than the request's would.

    Whoever loses one still holds LEAD times what the request's tenant then does: it is never
    far below in its turn, so nothing goes to and fro.
    """
    held = held_by_tenant(running)
    own = held.pop(request.terms.tenant, 0.0) + request.num_tokens / request.terms.weight
    for each in sorted(running, key=rank_of, reverse=True):
        name, amount = each.terms.tenant, each.num_tokens / each.terms.weight
        if name in held and held[name] - amount >= LEAD * own:
            held[name] -= amount
            yield each
