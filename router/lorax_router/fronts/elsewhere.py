"""What other cores gave tenants, as ingresses say it: charged here once, whoever says it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping


class ServiceElsewhere:
    """Sums by tenant, of which every ingress tells its own.

    ::

        ingress 1   100 …… 130 …… 180      told first, then grown by 80
        ingress 2            20 …… 60      told first, then grown by 40: 80 since ingress 1 began

    Ingresses over the same cores say the same twice. So a sum of one is taken for what was known
    when it began, and what it grew by since; the largest of all counts.

    Args:
        charge: charges tenants so much more.
    """

    def __init__(self, charge: Callable[[Mapping[str, float]], None]) -> None:
        self._charge = charge
        self._known: dict[str, float] = {}

    def teller(self) -> ServiceTeller:
        """Return what takes the sums of one ingress, for as long as it is attached."""
        return ServiceTeller(self)

    def known(self) -> dict[str, float]:
        """Return what is known to have been given elsewhere, by tenant."""
        return dict(self._known)

    def raise_to(self, sums: Mapping[str, float]) -> None:
        """Charge what is more than was known."""
        more = {each: sums[each] - self._known.get(each, 0.0) for each in sums}
        more = {each: amount for each, amount in more.items() if amount > 0}
        if more:
            self._known.update({each: sums[each] for each in more})
            self._charge(more)


class ServiceTeller:
    """One ingress: what it says is compared with what it said first.

    Args:
        elsewhere: what all have said.
    """

    def __init__(self, elsewhere: ServiceElsewhere) -> None:
        self._elsewhere = elsewhere
        # What is to be added to its sums; None: it has said nothing.
        self._offsets: dict[str, float] | None = None

    def tell(self, sums: Mapping[str, float]) -> None:
        """Take sums, the first time all of them, then those that grew."""
        if self._offsets is None:
            self._offsets = self._elsewhere.known()
            for tenant, amount in sums.items():
                self._offsets[tenant] = self._offsets.get(tenant, 0.0) - amount
            return
        offsets = self._offsets
        self._elsewhere.raise_to(
            {each: offsets.get(each, 0.0) + amount for each, amount in sums.items()}
        )


class QueuedElsewhere:
    """What tenants have waiting at other cores, as every ingress says it; the most that one says counts.

    Args:
        count: takes what tenants have waiting there.
    """

    def __init__(self, count: Callable[[Mapping[str, tuple[int, int]]], None]) -> None:
        self._count = count
        self._told: dict[Hashable, Mapping[str, tuple[int, int]]] = {}

    def tell(self, ingress: Hashable, depths: Mapping[str, tuple[int, int]]) -> None:
        """Take what one ingress knows now, in place of what it said before."""
        if depths != self._told.get(ingress, {}):
            self._told[ingress] = depths
            self._count_all()

    def forget(self, ingress: Hashable) -> None:
        """An ingress is gone, and what it said is old."""
        if self._told.pop(ingress, None):
            self._count_all()

    def _count_all(self) -> None:
        most: dict[str, tuple[int, int]] = {}
        for depths in self._told.values():
            for tenant, (requests, tokens) in depths.items():
                known = most.get(tenant, (0, 0))
                most[tenant] = max(known[0], requests), max(known[1], tokens)
        self._count(most)
