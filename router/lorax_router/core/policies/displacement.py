"""Which rows give way to a tenant or an adapter that has less, and how much that may cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from math import inf

from lorax_router.core.request import RequestState, rank_of

# A request that gave way so often is left alone by those who wait.
MAX_DISPLACEMENTS = 3
# So much of the time may be lost to tenants whom others give way to, and to adapters whom others of
# their tenant do.
LOST_TO_TENANTS, LOST_TO_ADAPTERS = 0.025, 0.01
# The part of what is saved up that is kept for tenants which have no row.
FOR_FIRST_ROWS = 0.05
# How much more than whoever takes rows others keep of what they hold.
LEAD = 1.35


class LossAllowance:
    """What may be computed again for the sake of those whom others give way to.

    It is counted in tokens of prompts, since what gave way is computed again like one: a step
    earns a share of what could have been computed in its time.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        # What runs first says how much.
        self._saved = self._most = inf

    def earn(self, num_tokens: float) -> None:
        """In the time that went by so much could have been computed."""
        self._saved += self._share * num_tokens

    def spend(self, num_tokens: int) -> None:
        """Some will be computed again."""
        self._saved -= num_tokens

    def look(self, running: Collection[RequestState]) -> None:
        """Let go of what is too much to be saved beside what runs now: all that it computed."""
        self._most = sum(each.num_computed for each in running)
        self._saved = min(self._saved, self._most)

    def is_left(self, kept: float = 0.0) -> bool:
        """Whether something may be lost, if such a part of what may be saved is kept for others."""
        return self._saved > kept * self._most


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
    enough = _far_above(request, held.pop(request.terms.tenant, 0.0))
    return enough <= max(held.values(), default=0.0)


def beyond_the_share(
    request: RequestState, running: Sequence[RequestState]
) -> Iterator[RequestState]:
    """Return rows of tenants that hold, by weight, far more than the request's would.

    Whoever loses one still holds far more than the request's tenant then does, so nothing goes
    to and fro.
    """
    held = held_by_tenant(running)
    enough = _far_above(request, held.pop(request.terms.tenant, 0.0))
    for each in sorted(running, key=rank_of, reverse=True):
        name, amount = each.terms.tenant, each.num_tokens / each.terms.weight
        if name in held and held[name] - amount >= enough:
            held[name] -= amount
            yield each


def _far_above(request: RequestState, held: float) -> float:
    """Return what is far more than a tenant holds if its request enters.

    Tenants that have few rows are often one row apart, whatever that is in parts of what they
    hold: so one as large as the request comes on top.
    """
    num = request.num_tokens / request.terms.weight
    return LEAD * (held + num) + num
