"""Classes: a better class goes first and takes the place of worse ones that run."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.request import RequestState, rank_of

# Of so many requests admitted while a worse class waits, the next one is of a worse class.
SHARE_OF_BETTER = 8


class StrictPriority(FirstComeFirstServed):
    """The smallest priority first, in order of arrival within a class.

    Nobody of a worse class passes one that does not fit. While worse classes wait, after
    SHARE_OF_BETTER admissions of better ones their oldest request is admitted, and then it
    ranks before all classes: it ends, whatever comes. So the request that is n-th in line of
    all worse classes waits for at most n * (SHARE_OF_BETTER + 1) admissions.

    Prompts of classes worse than one that was seen have short steps, since those that are
    under way are what an urgent request waits for; one whose turn it is has what it needs.
    """

    displaces = True
    _num_ahead = 0
    _best_seen = inf

    def push(self, request: RequestState) -> None:
        """Queue by class; one that a worse class's share let in keeps its rank."""
        if request.rank != -inf:
            request.rank = request.terms.priority
        self._best_seen = min(self._best_seen, request.terms.priority)
        self._assess(request)
        self._waiting.push(request, request.terms.priority)

    def _assess(self, request: RequestState) -> None:
        request.is_patient = request.terms.priority > self._best_seen
        request.has_turn = False

    def remove(self, request: RequestState) -> None:
        """Take out."""
        self._waiting.remove(request, request.terms.priority)

    def head(self) -> RequestState | None:
        """Return the first of the best class, or of the others when it is their turn."""
        best = super().head()
        if best is None or self._num_ahead < SHARE_OF_BETTER:
            return best
        worse = self._waiting.worse(best.terms.priority)
        head = min(worse, key=lambda each: each.order, default=best)
        head.has_turn = head is not best
        return head

    def _is_turn_of(self, request: RequestState) -> bool:
        """Whether it goes before a better one that waits."""
        best = super().head()
        return best is not None and rank_of(request) > rank_of(best)

    def admitted(self, request: RequestState) -> None:
        """Count how many went before a worse class that waits."""
        is_share = self._is_turn_of(request)
        has_worse = next(self._waiting.worse(request.terms.priority), None) is not None
        # The last class goes on by one, be it its turn or not.
        self._num_ahead = self._num_ahead + 1 if has_worse and not is_share else 0
        super().admitted(request)
        if is_share:
            request.rank = -inf

    def deferred(self, request: RequestState) -> None:
        """No worse class is looked at in this round; a turn that has to wait is none yet."""
        self._assess(request)
        self._waiting.defer(request, request.terms.priority)
        self._waiting.leave_out_worse(request.terms.priority)

    def is_entitled(self, request: RequestState, running: Sequence[RequestState]) -> bool:
        """Whether a row runs that may give way to it."""
        return bool(self.displaced(request, running))

    def displaced(
        self, request: RequestState, running: Sequence[RequestState]
    ) -> list[RequestState]:
        """All that run in worse classes, the latest of the worst first.

        Where it is a worse class's turn those of its own class, too: better ones wait behind it
        for no longer than if it fitted.
        """
        is_turn = self._is_turn_of(request)
        worse = [
            each
            for each in running
            if each.rank > request.rank or (is_turn and each.rank == request.rank)
        ]
        return sorted(worse, key=rank_of, reverse=True)
