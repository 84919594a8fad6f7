"""How much service clients got, and how far apart those who wanted it were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lorax_router.core.policies.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT
from lorax_router.simulator.trace import Floats, Ints

# Comparing pairs is quadratic: those that ask for most are compared.
MAX_COMPARED = 64
# So many points of service over time are kept.
MAX_WINDOWS = 480


class ServiceMeter:
    """Service by client, and the largest gap between two that wait.

    Service is what Sheng et al. (2024) count: tokens of prompts, and twice those of outputs;
    what is computed again counts once. A client is backlogged while one of its requests
    waits. The gap is the largest difference, by weight, of what two clients got in any
    interval throughout which both are backlogged.

    Args:
        weights: share of each client.
        compared: clients whose gaps are taken.
        window_s: how often the service so far is kept for plots, at first.
    """

    def __init__(self, weights: Sequence[float], compared: Sequence[int], window_s: float) -> None:
        self.service = [0.0] * len(weights)
        self.compared = list(compared)
        self.window_s = window_s
        self.series: list[list[float]] = []
        self.gap = 0.0
        self.gap_pair: tuple[int, int] | None = None
        self._num_waiting = [0] * len(weights)
        self._places = {client: i for i, client in enumerate(self.compared)}
        self._shares = np.array([weights[client] for client in self.compared])
        # Of service[i] - service[j] since both are backlogged.
        self._low = np.zeros((len(self.compared), len(self.compared)))
        self._high = np.zeros_like(self._low)
        self._backlogged: list[int] = []
        self._next_window = window_s

    # --- backlog ------------------------------------------------------------------

    def waits(self, client: int) -> None:
        """A request began to wait."""
        self._num_waiting[client] += 1
        if self._num_waiting[client] == 1 and client in self._places:
            self._joins(self._places[client])

    def leaves(self, client: int) -> None:
        """A request waits no more."""
        self._num_waiting[client] -= 1
        if not self._num_waiting[client] and client in self._places:
            self._backlogged.remove(self._places[client])

    def _joins(self, place: int) -> None:
        difference = self._got(place) - np.array([self._got(i) for i in range(len(self.compared))])
        for kept in (self._low, self._high):
            kept[place, :] = difference
            kept[:, place] = -difference
        self._backlogged.append(place)

    def _got(self, place: int) -> float:
        return self.service[self.compared[place]] / float(self._shares[place])

    # --- service ------------------------------------------------------------------

    def serve(self, amounts: Mapping[int, float], now: float) -> None:
        """Book what a step gave."""
        while now >= self._next_window:
            self._keep_window()
        service = self.service
        for client, amount in amounts.items():
            service[client] += amount
        if len(self._backlogged) > 1:
            self._compare()

    def _compare(self) -> None:
        places = np.array(self._backlogged)
        clients = [self.service[self.compared[i]] for i in self._backlogged]
        got = np.array(clients) / self._shares[places]
        difference = got[:, None] - got[None, :]
        pairs = np.ix_(places, places)
        low = np.minimum(self._low[pairs], difference)
        high = np.maximum(self._high[pairs], difference)
        self._low[pairs], self._high[pairs] = low, high
        gaps = high - low
        largest = float(gaps.max())
        if largest > self.gap:
            self.gap = largest
            one, other = divmod(int(gaps.argmax()), len(places))
            self.gap_pair = self.compared[places[one]], self.compared[places[other]]

    def _keep_window(self) -> None:
        self.series.append([self.service[client] for client in self.compared])
        if len(self.series) == MAX_WINDOWS:
            # How long a run takes is not known before: windows grow with it.
            del self.series[::2]
            self.window_s *= 2
        self._next_window = self.window_s * (len(self.series) + 1)

    def finish(self) -> None:
        """Keep the last window."""
        self._keep_window()


def most_asking(clients: Ints, work: Floats, num_clients: int) -> list[int]:
    """Return the clients that ask for most work, at most MAX_COMPARED, in their order."""
    asked = np.bincount(clients, weights=work, minlength=num_clients)
    active = np.flatnonzero(asked)
    most = sorted(active, key=lambda client: (-asked[client], client))[:MAX_COMPARED]
    return sorted(int(client) for client in most)


def vtc_bound(max_prompt: int, kv_tokens: int) -> float:
    """Return the bound of Sheng et al.: 2 max(w_p L_in, w_q M), M tokens in the KV pool."""
    return 2 * max(PROMPT_WEIGHT * max_prompt, OUTPUT_WEIGHT * kv_tokens)
