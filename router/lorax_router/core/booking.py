"""What an outcome says was computed, booked on the requests of its step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import or_

from lorax_contract.step import BASE_ADAPTER, RequestId, StepOutcome
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.cost import StepWork
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.request import RequestState, Status
from lorax_router.core.step_builder import PlannedRow


class ProtocolError(Exception):
    """An outcome does not belong to the plans in flight: router and shard disagree."""


@dataclass(slots=True)
class StepInFlight:
    """A plan that is not applied yet."""

    seq: int
    rows: list[PlannedRow]
    # What its time is the price of; None: it did something else besides, or less.
    work: StepWork | None
    planned_at: float

    def take_out(self, residences: Collection[tuple[RequestId, int]]) -> None:
        """Nothing is computed of some rows, by request and incarnation, and nothing told of them."""
        left = []
        for row in self.rows:
            if (row.request.request_id, row.incarnation) not in residences:
                left.append(row)
            else:
                row.request.num_pending -= row.reports
                self.work = None
        self.rows = left


def take_out_failed(
    steps: Iterable[StepInFlight], failed: Collection[RequestId]
) -> list[PlannedRow]:
    """Take rows of failed passes out of their step, the first one, and of those planned after it.

    Return the rows as the first one has them.
    """
    gone: list[PlannedRow] = []
    residences: set[tuple[RequestId, int]] = set()
    for number, step in enumerate(steps):
        if not number:
            gone = [row for row in step.rows if row.request.request_id in failed]
            residences = {(row.request.request_id, row.incarnation) for row in gone}
        step.take_out(residences)
    return gone


def accepted_drafts(outcome: StepOutcome) -> dict[RequestId, int]:
    """Return the tokens of each row that came of its draft: of several tokens all but one."""
    if max(outcome.num_tokens, default=0) <= 1:
        return {}
    columns = zip(outcome.row_ids, outcome.num_tokens, strict=True)
    return {row_id: num - 1 for row_id, num in columns if num > 1}


def tells_only_tokens(outcome: StepOutcome) -> bool:
    """Whether an outcome has a token for each of its rows, of which some may end with it."""
    other = outcome.failed or outcome.inactive or outcome.num_drafted
    return not other and outcome.num_tokens.count(1) == len(outcome.num_tokens)


def ended_rows(outcome: StepOutcome) -> list[RequestId]:
    """Return the rows that end with an outcome."""
    return list(compress(outcome.row_ids, outcome.finish))


def reported_rows(outcome: StepOutcome) -> Iterable[RequestId]:
    """Return the rows of which an outcome has a token or an end."""
    return compress(outcome.row_ids, map(or_, outcome.num_tokens, outcome.finish))


def book_computed(
    rows: Sequence[PlannedRow], accepted: Mapping[RequestId, int], block_size: int
) -> tuple[set[RequestId], list[RequestState]]:
    """Advance the rows that are still where they were.

    ``accepted``: tokens of drafts, computed beside what was planned.
    Returns who must be reported of, and whose blocks became full.
    """
    awaited: set[RequestId] = set()
    filled: list[RequestState] = []
    finished = Status.FINISHED
    for request, incarnation, num, reports in rows:
        if request.status is finished:
            continue
        if request.incarnation == incarnation:
            num_computed = request.num_computed = request.num_computed + num
            if reports and accepted and (num_more := accepted.get(request.request_id)):
                _book_more(request, num_more, block_size)
                num_computed = request.num_computed
            if num_computed // block_size != request.num_indexed:
                filled.append(request)
        if reports:
            request.num_pending -= 1
            awaited.add(request.request_id)
    return awaited, filled


class TokenBook:
    """Appends the tokens of outcomes to their requests. Owned by the Scheduler.

    Args:
        requests: those that have not ended.
        policy, adapters: are told who got tokens.
        finished: is told of a request that ends with an outcome, and how.
    """

    def __init__(
        self,
        requests: Mapping[RequestId, RequestState],
        policy: SchedulingPolicy,
        adapters: AdapterTable,
        finished: Callable[[RequestState, int], None],
    ) -> None:
        self._requests = requests
        self._policy = policy
        self._adapters = adapters
        self._finished = finished

    def book(self, outcome: StepOutcome, now: float) -> list[bool]:
        """Return for each row of an outcome whether it counts; those of ended requests do not."""
        accepted: list[bool] = []
        start = 0
        ids, known, served = outcome.tokens.ids, self._requests.get, self._policy.served
        for row_id, num, finish in zip(
            outcome.row_ids, outcome.num_tokens, outcome.finish, strict=True
        ):
            request = known(row_id)
            accepted.append(request is not None)
            if request is not None:
                if num:
                    if num == 1:
                        request.output_ids.append(ids[start])
                    else:
                        request.output_ids += ids[start : start + num]
                    request.num_tokens += num
                    if request.spec.adapter != BASE_ADAPTER:
                        self._adapters.progresses(request.spec.adapter, now)
                    served(request, num)
                if finish:
                    self._finished(request, finish)
            start += num
        return accepted


def _book_more(request: RequestState, num: int, block_size: int) -> None:
    """Advance a row that computed more than was planned, within its blocks."""
    request.num_computed += num
    request.num_scheduled += num
    request.is_drafted = True
    if request.num_scheduled > len(request.blocks) * block_size:
        raise ProtocolError(
            f"request {request.request_id} computed {num} tokens more than its blocks hold"
        )
