"""Fairness of tenants over replicas: each replica is told what the others gave to whom.

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

    incarnation: str
    # The largest sum that it reported: of what is paid back, what comes next is less.
    reported: dict[str, float] = field(default_factory=dict)
    # What it gave, of all incarnations; of what the others gave, what it knows.
    given: dict[str, float] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)


class ServiceExchange:
    """Sums what replicas gave each tenant, and tells each of them what the others gave.

    A replica that joins is told nothing of the past: its scheduler lifts whoever begins to wait.
    """

    def __init__(self) -> None:
        self._total: dict[str, float] = {}
        self._accounts: dict[str, _Account] = {}

    def report(self, replica: str, incarnation: str, served: Mapping[str, float]) -> None:
        """Take a replica's sums since it started; ``incarnation`` differs after each start.

        O(tenants). A tenant that is not in it begins anew.
        """
        account = self._accounts.get(replica)
        if account is None or account.incarnation != incarnation:
            account = self._accounts[replica] = _Account(incarnation, told=dict(self._total))
        for tenant, amount in served.items():
            more = amount - account.reported.get(tenant, 0.0)
            if more > 0:
                self._total[tenant] = self._total.get(tenant, 0.0) + more
                account.given[tenant] = account.given.get(tenant, 0.0) + more
                account.reported[tenant] = amount
        for tenant in account.reported.keys() - served.keys():
            del account.reported[tenant]

    def take(self, replica: str) -> dict[str, float]:
        """Return what the others gave since this was asked for a replica; each part once."""
        account = self._accounts.get(replica)
        if account is None:
            return {}
        news: dict[str, float] = {}
        for tenant, total in self._total.items():
            elsewhere = total - account.given.get(tenant, 0.0)
            if (more := elsewhere - account.told.get(tenant, 0.0)) > 0:
                news[tenant] = more
                account.told[tenant] = elsewhere
        return news

    def forget(self, replica: str) -> None:
        """A replica is gone; what it gave stays given."""
        self._accounts.pop(replica, None)
