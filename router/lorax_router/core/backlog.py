"""The requests that were never admitted yet: how many each tenant may have, how fast they go.

What is counted is what waits for its first step. A request that was preempted has its place
already, and is never counted again: so a limit refuses what comes, and nothing else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import NamedTuple

from lorax_contract.errors import BusyError, QueueFullError, ValidationError
from lorax_contract.step import RequestId, RequestSpec
from lorax_contract.words import counted
from lorax_router.core.request import RequestState, RequestTerms

# What a refused client is told to wait, in seconds.
LEAST_RETRY_S, MOST_RETRY_S = 1, 60
# How far back rates look, in seconds in which something waited.
_MEMORY_S = 30.0
# What stands for the past where little is known: one request in a second.
_PRIOR_REQUESTS, _PRIOR_S = 1.0, 1.0
# Admissions from which on a rate is trusted to foretell.
_LEAST_SEEN = 4.0
# Idle tenants whose rates are remembered.
_MAX_IDLE = 1_000


def tokens_of(spec: RequestSpec) -> int:
    """Return what a request counts for: its prompt and the most that it may generate."""
    return len(spec.prompt_ids) + spec.stopping.max_new_tokens


class DrainRate:
    """How fast a queue is emptied by admissions, measured while something is in it.

    Both sums fade with the time that is measured, so that an idle hour changes nothing, and
    a queue that stands still is seen to become slower.
    """

    __slots__ = ("_requests", "_seconds", "_since", "_tokens")

    def __init__(self) -> None:
        self._requests = self._tokens = self._seconds = 0.0
        # Until when it is measured; None: the queue is empty.
        self._since: float | None = None

    def starts(self, now: float) -> None:
        """Something waits again."""
        self._since = now

    def stops(self, now: float) -> None:
        """Nothing waits any more."""
        self._pass(now)
        self._since = None

    def admitted(self, num_tokens: int, now: float) -> None:
        """A request left the queue for a step."""
        self._pass(now)
        self._requests += 1
        self._tokens += num_tokens

    def seconds_to_drain(self, num_requests: int, num_tokens: int, now: float) -> float:
        """Return how long a queue lasts at this rate; where nothing is known, a cautious guess.

        More tokens or more requests never give a shorter time.
        """
        if not num_requests:
            return 0.0
        requests, tokens, seconds = self._at(now)
        seconds += _PRIOR_S
        by_requests = num_requests * seconds / (requests + _PRIOR_REQUESTS)
        usual = num_tokens / num_requests
        by_tokens = num_tokens * seconds / (tokens + _PRIOR_REQUESTS * usual)
        return max(by_requests, by_tokens)

    def requests_per_s(self, now: float) -> float | None:
        """Return how many requests are admitted in a second; None while too few were seen."""
        requests, _, seconds = self._at(now)
        return requests / seconds if requests >= _LEAST_SEEN and seconds else None

    def _at(self, now: float) -> tuple[float, float, float]:
        """Return requests, tokens and seconds as they have faded until now; nothing is changed."""
        if self._since is None or now <= self._since:
            return self._requests, self._tokens, self._seconds
        fading = math.exp((self._since - now) / _MEMORY_S)
        seconds = self._seconds * fading + _MEMORY_S * (1.0 - fading)
        return self._requests * fading, self._tokens * fading, seconds

    def _pass(self, now: float) -> None:
        self._requests, self._tokens, self._seconds = self._at(now)
        if self._since is not None:
            self._since = max(self._since, now)


class _Line:
    """A queue with what is in it: a tenant's, or that of all."""

    __slots__ = ("num_requests", "num_tokens", "rate")

    def __init__(self) -> None:
        self.num_requests = self.num_tokens = 0
        self.rate = DrainRate()

    def joins(self, num_tokens: int, now: float) -> None:
        if not self.num_requests:
            self.rate.starts(now)
        self.num_requests += 1
        self.num_tokens += num_tokens

    def leaves(self, num_tokens: int, now: float, *, admitted: bool) -> None:
        if admitted:
            self.rate.admitted(num_tokens, now)
        self.num_requests -= 1
        self.num_tokens -= num_tokens
        if not self.num_requests:
            self.rate.stops(now)

    def retry_after_s(self, now: float) -> int:
        """Return when what waits now will have been admitted, in bounds."""
        seconds = self.rate.seconds_to_drain(self.num_requests, self.num_tokens, now)
        return min(max(math.ceil(seconds), LEAST_RETRY_S), MOST_RETRY_S)


class _Place(NamedTuple):
    """Where a request stands: behind how many of its like, and how many had left before."""

    num_tokens: int
    like: Hashable
    num_ahead: int
    num_left: int


class QueueDepth(NamedTuple):
    """What a tenant has waiting."""

    num_requests: int
    num_tokens: int


class Backlog:
    """Keeps the queue within its limits. Owned by the Scheduler.

    Args:
        max_requests, max_tokens: what all tenants together may have waiting; None: no limit.
    """

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._all = _Line()
        self._tenants: dict[str, _Line] = {}
        self._elsewhere: Mapping[str, tuple[int, int]] = {}
        self._places: dict[RequestId, _Place] = {}
        # Of requests of one tenant, adapter, class and size: how many wait, how many have left.
        self._waiting: Counter[Hashable] = Counter()
        self._left: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return self._all.num_requests

    def depths(self) -> Iterator[tuple[str, QueueDepth]]:
        """Yield what each tenant has waiting that has anything."""
        for tenant, line in self._tenants.items():
            if line.num_requests:
                yield tenant, QueueDepth(line.num_requests, line.num_tokens)

    def queued_elsewhere(self, depths: Mapping[str, tuple[int, int]]) -> None:
        """Count what tenants have waiting at other servers, requests and tokens, from now on."""
        self._elsewhere = depths

    def check(self, terms: RequestTerms, num_requests: int, num_tokens: int, now: float) -> None:
        """Raise why requests may not join the queue, together; nothing is changed.

        QueueFullError: their tenant has too much in it; BusyError: all together have;
        ValidationError: they never could.
        """
        limits = terms.limits
        if limits.is_exempt:
            return
        line = self._tenants.get(terms.tenant) or _Line()
        _check_ever(limits.queued_requests, limits.queued_tokens, num_requests, num_tokens)
        _check_ever(self._max_requests, self._max_tokens, num_requests, num_tokens)
        elsewhere = QueueDepth(*self._elsewhere.get(terms.tenant, (0, 0)))
        if text := _excess(
            QueueDepth(
                line.num_requests + elsewhere.num_requests, line.num_tokens + elsewhere.num_tokens
            ),
            limits.queued_requests, limits.queued_tokens, num_requests, num_tokens,
        ):  # fmt: skip
            seconds = line.retry_after_s(now)
            raise QueueFullError(
                f"{text} of yours wait already, and no more may; try again in "
                f"{counted(seconds, 'second')}",
                retry_after_s=seconds,
            )
        if _excess(self._all, self._max_requests, self._max_tokens, num_requests, num_tokens):
            raise BusyError(retry_after_s=self._all.retry_after_s(now))

    def joins(self, request: RequestState, now: float) -> None:
        """A new request waits."""
        tenant, num_tokens, like = request.terms.tenant, tokens_of(request.spec), _like(request)
        self._places[request.request_id] = _Place(
            num_tokens, like, self._waiting[like], self._left[like]
        )
        self._waiting[like] += 1
        self._tenants.setdefault(tenant, _Line()).joins(num_tokens, now)
        self._all.joins(num_tokens, now)

    def leaves(self, request: RequestState, now: float, *, admitted: bool) -> None:
        """A request is admitted, or gives up; nothing happens if it had left before."""
        place = self._places.pop(request.request_id, None)
        if place is None:
            return
        self._waiting[place.like] -= 1
        self._left[place.like] += 1
        if not self._waiting[place.like]:
            del self._waiting[place.like], self._left[place.like]
        for line in (self._tenants[request.terms.tenant], self._all):
            line.leaves(place.num_tokens, now, admitted=admitted)
        if len(self._tenants) > _MAX_IDLE:
            self._forget()

    def num_ahead(self, request: RequestState) -> int:
        """Return how many of the same tenant, adapter, class and size came before and still wait.

        There may be more: whoever gave up counts as one of them. Of a request that has not
        joined yet all are before it.
        """
        place = self._places.get(request.request_id)
        if place is None:
            return 0 if request.was_admitted else self._waiting[_like(request)]
        return max(0, place.num_ahead - (self._left[place.like] - place.num_left))

    def requests_per_s(self, tenant: str, now: float) -> float | None:
        """Return how many requests of a tenant are admitted in a second; None: not known yet."""
        line = self._tenants.get(tenant)
        return None if line is None else line.rate.requests_per_s(now)

    def _forget(self) -> None:
        """Forget the rates of tenants that have nothing waiting."""
        self._tenants = {name: each for name, each in self._tenants.items() if each.num_requests}

    def check_sums(self, waiting: int) -> None:
        """Raise AssertionError unless the sums are right; ``waiting`` were never admitted."""
        lines = self._tenants.values()
        sums = (
            len(self._places), sum(self._waiting.values()), self._all.num_requests,
            sum(each.num_requests for each in lines),
        )  # fmt: skip
        if set(sums) != {waiting}:
            raise AssertionError(f"{waiting} requests wait anew, and the queue counts {sums}")
        tokens = sum(place.num_tokens for place in self._places.values())
        if not tokens == self._all.num_tokens == sum(each.num_tokens for each in lines):
            raise AssertionError("the tokens in the queue are counted wrong")


def _like(request: RequestState) -> Hashable:
    """What requests have in common that go in order of arrival: short ones may pass long ones."""
    terms, size = request.terms, len(request.spec.prompt_ids).bit_length()
    return terms.tenant, request.spec.adapter, terms.priority, size


def _check_ever(
    max_requests: int | None, max_tokens: int | None, num_requests: int, num_tokens: int
) -> None:
    """Raise ValidationError for what would not fit into the empty queue."""
    if max_requests is not None and num_requests > max_requests:
        raise ValidationError(
            f"`n` asks for {counted(num_requests, 'sequence')}, and at most {max_requests} may "
            "wait at once; ask for less"
        )
    if max_tokens is not None and num_tokens > max_tokens:
        raise ValidationError(
            f"the prompt and `max_new_tokens` come to {num_tokens} tokens, and at most "
            f"{max_tokens} may wait at once; shorten the prompt or lower `max_new_tokens`"
        )


def _excess(
    line: _Line | QueueDepth,
    max_requests: int | None,
    max_tokens: int | None,
    num_requests: int,
    num_tokens: int,
) -> str:
    """Return what a queue has too much of, in words; empty if more may join."""
    if max_requests is not None and line.num_requests + num_requests > max_requests:
        return counted(line.num_requests, "request")
    if max_tokens is not None and line.num_tokens + num_tokens > max_tokens:
        return counted(line.num_tokens, "token")
    return ""
