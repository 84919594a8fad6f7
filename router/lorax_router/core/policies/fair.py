"""Fair shares: between tenants by weight, then between the adapters of each tenant."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import (
    Callable,
    Collection,
    Container,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from heapq import heapify, heappop, heapreplace
from math import inf
from typing import Generic, Protocol, TypeVar

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.draining import longest_resident
from lorax_router.core.adapters.record import AdapterRecord
from lorax_router.core.policies.displacement import (
    FOR_FIRST_ROWS,
    LOST_TO_ADAPTERS,
    LOST_TO_TENANTS,
    MAX_DISPLACEMENTS,
    LossAllowance,
    beyond_the_first,
    beyond_the_share,
    held_by_tenant,
    is_below_others,
)
from lorax_router.core.policies.queue import WaitingRequests
from lorax_router.core.policies.ranked import MAX_BYPASSES
from lorax_router.core.policies.shares import Shares
from lorax_router.core.request import RequestState, rank_of

Member = TypeVar("Member", bound=Hashable)

# What a token of a prompt and one of an output count for.
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
# What bringing an adapter to the shards counts for, in tokens of a prompt.
LOAD_CHARGE = 256.0
# Of the adapters that wait for a slot so many are compared, those that wait longest.
_MAX_COMPARED = 64


class _Headed(Protocol):
    def head(self) -> RequestState | None: ...


class _Round(Generic[Member]):
    """Members of one level in order of their service; as heads change, so does the order.

    Within a round service only grows, and heads only become younger: an entry of the heap is
    at worst too low, and is put right when it comes to the top. So nobody's head is looked at
    before it is somebody's turn.
    """

    def __init__(self, shares: Shares[Member], members: Mapping[Member, _Headed]) -> None:
        self._shares = shares
        self._members = members
        self._heap = [(shares[member], -1, member) for member in members]
        heapify(self._heap)

    def head(self) -> RequestState | None:
        """Return the head of whoever got least, the oldest if they are equal."""
        while self._heap:
            service, order, member = self._heap[0]
            head = self._members[member].head()
            if head is None:
                heappop(self._heap)
            elif (service, order) == (self._shares[member], head.order):
                return head
            else:
                heapreplace(self._heap, (self._shares[member], head.order, member))
        return None


class _Tenant:
    """The adapters that one tenant waits with."""

    def __init__(self) -> None:
        self.shares: Shares[AdapterHandle] = Shares()
        self.num_waiting = 0
        self.running: set[RequestState] = set()

    def held(self) -> float:
        """Return the tokens of its rows, by weight."""
        return sum(each.num_tokens / each.terms.weight for each in self.running)


class _TenantRound:
    """One tenant in a round; its adapters are looked at when it is its turn."""

    def __init__(
        self,
        tenant: _Tenant,
        queues: Mapping[AdapterHandle, _Headed],
        adapters: Container[AdapterHandle],
    ) -> None:
        self._tenant = tenant
        self._queues = queues
        self._adapters = adapters
        self._round: _Round[AdapterHandle] | None = None

    def head(self) -> RequestState | None:
        """Return the first request of the least served of the adapters that admit."""
        if self._round is None:
            admitting = self._adapters
            queues = {each: queue for each, queue in self._queues.items() if each in admitting}
            self._round = _Round(self._tenant.shares, queues)
        return self._round.head()


class FairShare:
    """Two levels of virtual token counters, the order of arrival inside.

    A tenant that registers many adapters gets no more than one with a single adapter. What is
    charged: a prompt when it is admitted, less what need not be computed; each output token;
    an adapter that has to be brought. What is computed again after a preemption is free, and
    what was never computed is paid back.

    Memory goes by arrival, since it needs an order that does not change; of those who may have
    to give way the most served tenant's latest does.

    Args:
        max_bypasses: see SchedulingPolicy.
        load_charge: what bringing an adapter counts for, in tokens of a prompt.
    """

    reserves_all = False
    keeps_order = True
    displaces = True

    def __init__(
        self, *, max_bypasses: int = MAX_BYPASSES, load_charge: float = LOAD_CHARGE
    ) -> None:
        self.max_bypasses = max_bypasses
        self._load_charge = load_charge
        self._waiting: WaitingRequests[str] = WaitingRequests()
        self._shares: Shares[str] = Shares()
        self._tenants: dict[str, _Tenant] = {}
        self._weights: dict[str, float] = {}
        # Of the latest round.
        self._now = 0.0
        self._round: _Round[str] = _Round(self._shares, {})
        self._for_tenants = LossAllowance(LOST_TO_TENANTS)
        self._for_adapters = LossAllowance(LOST_TO_ADAPTERS)

    def __len__(self) -> int:
        return len(self._waiting)

    def service(self, tenant: str) -> float:
        """Return what a tenant got, in tokens by its weight."""
        return self._shares[tenant]

    def served_elsewhere(self, amounts: Mapping[str, float]) -> None:
        """Charge tenants what other servers gave them, so that shares hold over all of them.

        Which of a tenant's adapters got it makes no difference: those share what it gets here.
        """
        for tenant, amount in amounts.items():
            self._shares.grant(tenant, amount)

    def service_here(self) -> Mapping[str, float]:
        """Return what each tenant got of this server, in tokens by its weight."""
        return self._shares.earned()

    # --- the queue ----------------------------------------------------------------

    def push(self, request: RequestState) -> None:
        """Queue; a tenant or an adapter that begins to wait is lifted."""
        name, adapter = request.terms.tenant, request.spec.adapter
        tenant = self._tenants.setdefault(name, _Tenant())
        self._weights[name] = request.terms.weight
        tenant.running.discard(request)
        if not tenant.num_waiting:
            self._shares.joins(name, tenant.held())
        if name not in self._waiting.of(adapter):
            tenant.shares.joins(adapter)
        tenant.num_waiting += 1
        self._waiting.push(request, name)

    def remove(self, request: RequestState) -> None:
        """Take out; what is left of its charge is paid back."""
        self._take_out(request)
        self._refund(request)

    def _take_out(self, request: RequestState) -> None:
        name = request.terms.tenant
        tenant = self._tenants[name]
        tenant.num_waiting -= 1
        if self._waiting.remove(request, name):
            tenant.shares.leaves(request.spec.adapter)
        if not tenant.num_waiting:
            self._shares.leaves(name)

    def waiting_for(self, adapter: AdapterHandle) -> list[RequestState]:
        """Return the waiting requests that need an adapter, in order of arrival."""
        return sorted(self._waiting.requests(adapter), key=rank_of)

    # --- a round --------------------------------------------------------------------

    def start_round(self, now: float, adapters: Collection[AdapterHandle]) -> None:
        """Look at the tenants that wait, each with those of its adapters that admit."""
        self._now = now
        self._waiting.start_round()
        self._round = _Round(
            self._shares,
            {
                name: _TenantRound(self._tenants[name], queues, adapters)
                for name, queues in self._waiting.by_group().items()
            },
        )

    def head(self) -> RequestState | None:
        """Return the first request of the least served adapter of the least served tenant."""
        return self._round.head()

    def admitted(self, request: RequestState) -> None:
        """Charge what it was not charged for yet, and what is not in the cache."""
        self._take_out(request)
        self._tenants[request.terms.tenant].running.add(request)
        num = request.num_tokens - max(request.num_charged, request.num_cached)
        self._charge(request, PROMPT_WEIGHT * num)
        request.num_charged = request.num_tokens

    def deferred(self, request: RequestState) -> None:
        """Go on behind it; its tenant's counter stays."""
        self._waiting.of(request.spec.adapter)[request.terms.tenant].defer()

    # --- charges --------------------------------------------------------------------

    def served(self, request: RequestState, num_tokens: int) -> None:
        """Charge output tokens: as ``_charge`` does, without its call, since each row has some."""
        terms, amount = request.terms, OUTPUT_WEIGHT * num_tokens
        tenant = terms.tenant
        self._shares.charge(tenant, amount / terms.weight)
        self._tenants[tenant].shares.charge(request.spec.adapter, amount)
        request.num_charged += num_tokens

    def step_done(self, num_worth: float) -> None:
        """A part of it may be lost."""
        self._for_tenants.earn(num_worth)
        self._for_adapters.earn(num_worth)

    def ended(self, request: RequestState) -> None:
        """Pay back what was never computed."""
        self._tenants[request.terms.tenant].running.discard(request)
        self._refund(request)

    def _refund(self, request: RequestState) -> None:
        computed = max(request.num_computed, request.num_ever_computed)
        # The last token of an output is charged, and never computed.
        unused = min(request.num_charged, len(request.spec.prompt_ids)) - computed
        if unused > 0:
            self._charge(request, -PROMPT_WEIGHT * unused)
            request.num_charged -= unused

    def _charge(self, request: RequestState, amount: float) -> None:
        terms = request.terms
        tenant = terms.tenant
        self._shares.charge(tenant, amount / terms.weight)
        self._tenants[tenant].shares.charge(request.spec.adapter, amount)

    def prepares(self, adapter: AdapterHandle) -> None:
        """Charge an adapter to whoever got least of those who wait with it."""
        names = self._waiting.of(adapter)
        if names:
            name = min(names, key=self._shares.__getitem__)
            self._shares.charge(name, self._load_charge / self._weights[name])
            self._tenants[name].shares.charge(adapter, self._load_charge)

    # --- who gives way --------------------------------------------------------------

    def outranks(self, request: RequestState, other: RequestState) -> bool:
        """Only an older request may take memory from a younger one."""
        return request.order < other.order

    def victim(
        self,
        request: RequestState,
        outranked: Sequence[RequestState],
        running: Collection[RequestState],
        ease: Callable[[RequestState], int],
    ) -> RequestState | None:
        """Return who of the tenant that holds most loses least, the latest of those.

        Only the first row of a tenant takes from those that hold less: it may be the first of
        all, which has to go on.
        """
        held = held_by_tenant(running)
        tenant = request.terms.tenant
        if any(each.terms.tenant == tenant and each.order < request.order for each in running):
            most = held[tenant]
            outranked = [each for each in outranked if held[each.terms.tenant] >= most]
            if not outranked:
                return None
        ordered = self._by_claim(outranked, held)
        own = [each for each in ordered if each.terms.tenant == ordered[-1].terms.tenant]
        return max(reversed(own), key=ease)

    def is_entitled(self, request: RequestState, running: Sequence[RequestState]) -> bool:
        """Whether its tenant would hold far less than another does, or its adapter has no row."""
        return is_below_others(request, running) or bool(self._own_to_displace(request, running))

    def displaced(
        self, request: RequestState, running: Sequence[RequestState]
    ) -> list[RequestState]:
        """Rows for a tenant that has none, or far less than others; for an adapter without a row.

        Each keeps its oldest row, so whoever gives way does not take it back: it cannot go to
        and fro. Rows with a first token come before those that wait for it; of either those of whoever
        holds most, the latest first. Nobody gives way for ever, nor while too much was lost to it.
        """
        rows, allowance, kept = self._lower(request, running)
        allowance.look(running)
        if not allowance.is_left(kept):
            return []
        others = [each for each in rows if each.num_preemptions < MAX_DISPLACEMENTS]
        ordered = self._by_claim(others, held_by_tenant(running))[::-1]
        # Whoever waits for its first token yet would wait for it again.
        return sorted(ordered, key=lambda each: not each.output_ids)

    def _lower(
        self, request: RequestState, running: Sequence[RequestState]
    ) -> tuple[Sequence[RequestState], LossAllowance, float]:
        """Return rows of those who have more than the request's tenant, or its adapter.

        With them what pays for it, and which part of that is kept for others.
        """
        if all(each.terms.tenant != request.terms.tenant for each in running):
            others = beyond_the_first(running, lambda each: each.terms.tenant)
            return others, self._for_tenants, 0.0
        if others := self._own_to_displace(request, running):
            return others, self._for_adapters, 0.0
        return list(beyond_the_share(request, running)), self._for_tenants, FOR_FIRST_ROWS

    def _own_to_displace(
        self, request: RequestState, running: Sequence[RequestState]
    ) -> list[RequestState]:
        """Return rows of its tenant's other adapters, if its own has none."""
        tenant, adapter = request.terms.tenant, request.spec.adapter
        own = [each for each in running if each.terms.tenant == tenant]
        if any(each.spec.adapter == adapter for each in own):
            return []
        return beyond_the_first(own, lambda each: each.spec.adapter)

    def gives_way(self, request: RequestState, to: RequestState) -> None:
        """Count what is lost to it."""
        is_own = request.terms.tenant == to.terms.tenant
        allowance = self._for_adapters if is_own else self._for_tenants
        allowance.spend(request.num_computed)

    def _by_claim(
        self, rows: Sequence[RequestState], held: Mapping[str, float]
    ) -> list[RequestState]:
        """Put rows in the order in which they may keep what they hold.

        Those of whoever holds least come first, of its adapters those of the least served.
        """

        def claim(request: RequestState) -> tuple[float, float, int]:
            name = request.terms.tenant
            own = self._tenants[name].shares[request.spec.adapter]
            return held[name], own, request.order

        return sorted(rows, key=claim)

    def drained(
        self,
        record: AdapterRecord,
        candidates: Sequence[AdapterRecord],
        held: Collection[AdapterRecord],
        running: Collection[RequestState],
        *,
        has_waited: bool,
    ) -> AdapterRecord | None:
        """An adapter of the most served tenant, never one of a tenant that got less.

        A tenant's own take turns, but not before a request of each got a token: to bring one
        for another that was not served is charged, and serves nobody.

        At once a tenant that holds no slot gets one, from one that holds several: what its
        rows computed counts as lost.
        """
        names = self._waiting.of(record.handle)
        if not names:
            return longest_resident(record, candidates, held, has_waited=has_waited)
        name = min(names, key=self._shares.__getitem__)
        tenants = self._tenants_of(held, running)
        slots = Counter(each for names in tenants.values() for each in names)

        def rank(each: AdapterRecord) -> tuple[float, float]:
            users = tenants[each.handle]
            most = min((slots[user] / self._weights[user] for user in users), default=inf)
            return most, min((self._shares[user] for user in users), default=inf)

        if has_waited:
            turns = [
                each for each in candidates
                if all(self._shares[user] > self._shares[name] for user in tenants[each.handle])
                or (name in tenants[each.handle] and each.progressed_at is not None)
            ]  # fmt: skip
            return max(turns, key=lambda each: rank(each)[1], default=None)
        if slots[name]:
            return None
        others = [
            each for each in candidates if all(slots[user] > 1 for user in tenants[each.handle])
        ]
        if unused := [each for each in others if not each.num_running]:
            return max(unused, key=rank)
        return self._displaced_adapter(max(others, key=rank, default=None), running)

    def _displaced_adapter(
        self, record: AdapterRecord | None, running: Collection[RequestState]
    ) -> AdapterRecord | None:
        """Have the rows of an adapter give way, as far as that is allowed."""
        self._for_tenants.look(running)
        if record is None or not self._for_tenants.is_left():
            return None
        for each in running:
            if each.spec.adapter == record.handle:
                self._for_tenants.spend(each.num_computed)
        return record

    def _tenants_of(
        self, held: Collection[AdapterRecord], running: Collection[RequestState]
    ) -> dict[AdapterHandle, set[str]]:
        """Return who needs each adapter that holds a slot, now."""
        waiting = self._waiting.by_adapter()
        tenants = {each.handle: set(waiting.get(each.handle, ())) for each in held}
        for request in running:
            if request.spec.adapter in tenants:
                tenants[request.spec.adapter].add(request.terms.tenant)
        return tenants

    def adapter_line(self, wanted: Sequence[AdapterRecord]) -> Iterable[AdapterRecord]:
        """The least served tenant's come first, as if each that goes before were charged.

        If all are one tenant's, that whose requests have waited longest together: a slot is worth
        more to many. Pins that nobody waits for come last.
        """
        if len(self._tenants) > 1:
            return self._fair_line(wanted)
        return [*sorted(wanted[:_MAX_COMPARED], key=self._waited), *wanted[_MAX_COMPARED:]]

    def _waited(self, record: AdapterRecord) -> float:
        """Return for how long its requests have waited, all together, below zero."""
        since = self._now if record.wanted_at is None else record.wanted_at
        return -record.num_waiting * (self._now - since)

    def _fair_line(self, wanted: Sequence[AdapterRecord]) -> Iterator[AdapterRecord]:
        lines: dict[str, deque[AdapterRecord]] = {}
        others: list[AdapterRecord] = []
        waiting = self._waiting.by_adapter()
        for record in wanted:
            names = waiting.get(record.handle)
            if not names:
                others.append(record)
                continue
            name = min(names, key=self._shares.__getitem__) if len(names) > 1 else next(iter(names))
            if name in lines:
                lines[name].append(record)
            else:
                lines[name] = deque((record,))
        heap = [(self._shares[name], place, name) for place, name in enumerate(lines)]
        heapify(heap)
        while heap:
            service, place, name = heap[0]
            yield lines[name].popleft()
            if lines[name]:
                heapreplace(heap, (service + self._load_charge / self._weights[name], place, name))
            else:
                heappop(heap)
        yield from others
