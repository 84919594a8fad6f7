"""Fairness and quotas of tenants over replicas: each is told what the others gave to whom.

Replicas count for themselves, as one server does, and need nobody for it; what is exchanged are
sums, which may come late, twice or not at all. So a request waits for no answer of a center, and
while the ingress is gone replicas are fair each for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Account:
    """What one replica has said and was told, by tenant."""

    # The largest sum that it reported: of what is paid back, what comes next is less. None: it has
    # reported nothing.
    reported: dict[str, float] | None = None
    # What it gave since it joined; of what the others gave, what it knows.
    given: dict[str, float] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)


class QueueExchange:
    """Sums what tenants have waiting at replicas, as each of them said last: requests and tokens."""

    def __init__(self) -> None:
        self._depths: dict[str, Mapping[str, tuple[int, int]]] = {}
        # Of tenants with something waiting anywhere.
        self._sums: dict[str, tuple[int, int]] = {}

    def report(self, replica: str, depths: Mapping[str, tuple[int, int]]) -> None:
        """Take what waits at a replica, in place of what it said before. O(its tenants)."""
        self.leave(replica)
        self._depths[replica] = depths
        self._add(depths, 1)

    def elsewhere(self, replica: str) -> dict[str, tuple[int, int]]:
        """Return what waits at all others together. O(tenants that wait)."""
        own = self._depths.get(replica, {})
        found = {}
        for tenant, (requests, tokens) in self._sums.items():
            here = own.get(tenant, (0, 0))
            rest = requests - here[0], tokens - here[1]
            if any(rest):
                found[tenant] = rest
        return found

    def leave(self, replica: str) -> None:
        """A replica is gone, and what waited there waits elsewhere or not at all."""
        self._add(self._depths.pop(replica, {}), -1)

    def _add(self, depths: Mapping[str, tuple[int, int]], sign: int) -> None:
        for tenant, (requests, tokens) in depths.items():
            known = self._sums.pop(tenant, (0, 0))
            now = known[0] + sign * requests, known[1] + sign * tokens
            if any(now):
                self._sums[tenant] = now


class ServiceExchange:
    """Sums what replicas gave each tenant, and says to each of them what the others gave.

    What a replica gave before it joined is nobody's affair, and what others gave before is none of
    its: its scheduler lifts whoever begins to wait.
    """

    def __init__(self) -> None:
        self._total: dict[str, float] = {}
        self._accounts: dict[str, _Account] = {}

    def join(self, replica: str) -> None:
        """A replica is attached, perhaps again: its account begins."""
        self._accounts[replica] = _Account()

    def report(self, replica: str, served: Mapping[str, float]) -> None:
        """Take a replica's sums; the first ones are where counting begins.

        O(tenants). A tenant that is not in it begins anew.
        """
        account = self._accounts[replica]
        if account.reported is None:
            account.reported = dict(served)
            return
        for tenant, amount in served.items():
            more = amount - account.reported.get(tenant, 0.0)
            if more > 0:
                self._total[tenant] = self._total.get(tenant, 0.0) + more
                account.given[tenant] = account.given.get(tenant, 0.0) + more
                account.reported[tenant] = amount
        for tenant in account.reported.keys() - served.keys():
            del account.reported[tenant]

    def elsewhere(self, replica: str) -> dict[str, float]:
        """Return sums of what the others gave, those that grew since it was asked last.

        They never fall. The first time all of them are returned.
        """
        account = self._accounts.get(replica)
        if account is None:
            return {}
        news: dict[str, float] = {}
        for tenant, total in self._total.items():
            amount = total - account.given.get(tenant, 0.0)
            if amount > account.told.get(tenant, 0.0):
                news[tenant] = account.told[tenant] = amount
        return news

    def leave(self, replica: str) -> None:
        """A replica is gone; what it gave stays given."""
        self._accounts.pop(replica, None)
