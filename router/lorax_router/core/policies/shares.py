"""Service counters: who got how much, for those who want something all the time."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Member = TypeVar("Member", bound=Hashable)

# Idle members that are remembered beyond twice the number of waiting ones.
_MAX_IDLE = 1_000


class Shares(Generic[Member]):
    """Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, 2024).

    They count tokens, by weight. Whoever has the least goes first. A member that begins to wait is lifted to the least of
    those who wait already, or to whoever waited last: being idle earns no credit. Whoever
    cannot be served for a while keeps its counter, and goes first once it can.
    """

    def __init__(self) -> None:
        self._service: dict[Member, float] = {}
        # What is in a counter and was not got here: what it was lifted by, what others gave.
        self._granted: dict[Member, float] = {}
        self._waiting: set[Member] = set()
        self._last: Member | None = None

    def __getitem__(self, member: Member) -> float:
        return self._service.get(member, 0.0)

    def __len__(self) -> int:
        return len(self._service)

    def joins(self, member: Member, credit: float = 0.0) -> None:
        """A member begins to wait: O(members that wait). It may be below the others by a credit."""
        least = 0.0
        if self._waiting:
            least = min(self._service[each] for each in self._waiting)
        elif self._last is not None:
            least = self[self._last]
        lifted = max(self[member], least - credit)
        if lifted > self[member]:
            self._granted[member] = self._granted.get(member, 0.0) + lifted - self[member]
        self._service[member] = lifted
        self._waiting.add(member)

    def leaves(self, member: Member) -> None:
        """A member has nothing left that waits."""
        self._waiting.remove(member)
        self._last = member
        if len(self._service) > 2 * len(self._waiting) + _MAX_IDLE:
            self._forget()

    def charge(self, member: Member, amount: float) -> None:
        """A member got something, or gives it back."""
        service = self._service
        service[member] = service.get(member, 0.0) + amount

    def grant(self, member: Member, amount: float) -> None:
        """A member got something of others, which counts here, too."""
        self._granted[member] = self._granted.get(member, 0.0) + amount
        self.charge(member, amount)

    def earned(self) -> dict[Member, float]:
        """Return what each member got here; idle ones that were forgotten begin anew."""
        granted = self._granted
        return {each: service - granted.get(each, 0.0) for each, service in self._service.items()}

    def _forget(self) -> None:
        """Let go of idle members that would be lifted anyway; debts are kept."""
        least = min((self._service[each] for each in self._waiting), default=self[self._last])  # type: ignore[index]
        self._service = {
            each: service
            for each, service in self._service.items()
            if service > least or each in self._waiting or each == self._last
        }
        self._granted = {
            each: amount for each, amount in self._granted.items() if each in self._service
        }
