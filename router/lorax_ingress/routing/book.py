"""What one replica has to do, as far as is known: its latest view, and what was sent since."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf

from lorax_ingress.routing.values import ReplicaView


@dataclass(slots=True)
class SentRequest:
    """A request that was sent and has not ended."""

    replica: str
    adapter: str | None
    sent_at: float
    # Of it all, and what of that goes with its first token: its prompt, its adapter's way.
    work: float
    work_ahead: float
    can_preload: bool = False


class ReplicaBook:
    """One replica. ``extra`` is the work that its view does not have, or has too much.

    A view that was taken before a request was sent, or ended, does not know of it; so a view that
    is seconds old says nothing wrong about what this router did since.
    """

    __slots__ = (
        "_ended", "extra", "ladder", "sent", "told", "touched", "users", "view", "view_work",
    )  # fmt: skip

    def __init__(self, view: ReplicaView) -> None:
        self.view = view
        self.view_work = 0.0
        self.extra = 0.0
        self.sent: dict[str, SentRequest] = {}
        # Requests on their way by adapter; when each adapter was sent there last.
        self.users: dict[str, int] = {}
        self.touched: dict[str, float] = {}
        # Adapters that it was told to load before requests come, and has not said to have: when.
        self.told: dict[str, float] = {}
        # What each adapter that nobody uses is worth, the least first: those go for others.
        self.ladder: list[float] = []
        # Of those that ended lately: when they were sent and ended, and their work.
        self._ended: deque[tuple[float, float, float]] = deque()

    @property
    def work(self) -> float:
        """Requests that run or wait, a long prompt for several."""
        return max(self.view_work + self.extra, 0.0)

    @property
    def num_free_slots(self) -> int:
        """Slots for adapters that nothing holds and nothing is on its way to."""
        coming = sum(each not in self.view.resident for each in {*self.touched, *self.told})
        return self.view.num_slots - len(self.view.resident) - coming

    def holds(self, adapter: str) -> bool:
        """Whether an adapter is on the device, or will be because of what was sent."""
        return adapter in self.view.resident or adapter in self.touched

    @property
    def price(self) -> float:
        """What has to go for one adapter more, in worth; 0 where there is a free slot."""
        num_over = -self.num_free_slots
        if num_over < 0:
            return 0.0
        return self.ladder[num_over] if num_over < len(self.ladder) else inf

    def see(self, view: ReplicaView, prompt_unit: int) -> list[str]:
        """Take a view; return the adapters that were on their way and are not any more."""
        taken_at = view.taken_at
        self.view = view
        self.view_work = view.num_running + view.num_queued + view.num_queued_tokens / prompt_unit
        while self._ended and self._ended[0][1] <= taken_at:
            self._ended.popleft()
        unknown = sum(each.work for each in self.sent.values() if each.sent_at > taken_at)
        over = sum(work for sent_at, _, work in self._ended if sent_at <= taken_at)
        self.extra = unknown - over
        gone = [key for key, at in self.touched.items() if at <= taken_at and key not in self.users]
        for key in gone:
            del self.touched[key]
        return gone

    def add(self, request_id: str, request: SentRequest) -> None:
        """A request was sent there."""
        self.sent[request_id] = request
        self.extra += request.work
        if request.adapter is not None:
            self.users[request.adapter] = self.users.get(request.adapter, 0) + 1
            self.touched[request.adapter] = request.sent_at

    def begins(self, request_id: str) -> None:
        """Its first token is there: what is left is the work of a row."""
        request = self.sent[request_id]
        self.extra -= request.work_ahead
        request.work -= request.work_ahead
        request.work_ahead = 0.0

    def remove(self, request_id: str, now: float) -> None:
        """A request is over."""
        request = self.sent.pop(request_id)
        self.extra -= request.work
        self._ended.append((request.sent_at, now, request.work))
        if request.adapter is not None:
            self.users[request.adapter] -= 1
            if not self.users[request.adapter]:
                del self.users[request.adapter]
