"""Numbers of other ranks that are on their way while a rank goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch

from lorax_shard.transfer import to_host


class Arriving(Protocol):
    """What a collective brings that was begun, and that nobody waited for yet."""

    @property
    def tensor(self) -> torch.Tensor:
        """Rank 0's numbers, where steps are computed; to be used behind ``wait``."""

    @property
    def is_there(self) -> bool:
        """Whether all numbers have come."""

    def wait(self) -> None:
        """Return when what is launched from now on finds them; a device's are not waited for."""

    def read(self) -> list[list[int]]:
        """Return the numbers of each rank that gives any, once they are there; any thread."""


class ArrivingTensors:
    """Implements Arriving over torch.distributed.

    Args:
        numbers: what is filled, a line for each rank that gives.
        work: the collective; None: there is nothing to wait for.
        is_ordered: whether a device computes in the order in which it is told, collectives
            included; else whoever uses the numbers has to wait.
        blame: raises what a failed collective means.
    """

    def __init__(
        self,
        numbers: torch.Tensor,
        work: Any,
        *,
        is_ordered: bool,
        blame: Callable[[Exception], NoReturn],
    ) -> None:
        self._numbers = numbers
        self._work = work
        self._blame = blame
        self._lock = threading.Lock()
        self._on_host, self._arrived = numbers, None
        if is_ordered:
            self.wait()
            self._on_host, self._arrived = to_host(numbers)

    @property
    def tensor(self) -> torch.Tensor:
        """The first rank's numbers."""
        return self._numbers[0]

    @property
    def is_there(self) -> bool:
        """Whether all numbers have come, to the host too."""
        is_done = self._work is None or self._work.is_completed()
        return bool(is_done and (self._arrived is None or self._arrived.query()))

    def wait(self) -> None:
        """Return when what is launched from now on finds the numbers."""
        with self._lock:
            if self._work is not None:
                try:
                    self._work.wait()
                except RuntimeError as error:
                    self._blame(error)
                self._work = None

    def read(self) -> list[list[int]]:
        """Return the numbers, once they are there."""
        self.wait()
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[list[int]] = self._on_host.tolist()
        return found
