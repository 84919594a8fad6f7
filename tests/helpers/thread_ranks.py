"""Ranks as threads of one process: a RankGroup without sockets, and a way to run one per rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from lorax_shard.parallel.group import GroupBrokenError

_FAIL_S = 1.0

Result = TypeVar("Result")


class Meeting:
    """Where the threads of a group exchange values."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.values: list[Any] = [None] * world_size
        # By place: the ranks whose pass failed there.
        self.failed: dict[tuple[int, int], set[int]] = {}
        self.changed = threading.Condition()


class ThreadGroup:
    """Implements RankGroup for one thread of a meeting."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank = rank
        self.world_size = len(meeting.values)
        self.num_collectives = self.num_failures = 0
        self._meeting = meeting

    def _exchange(self, value: Any) -> list[Any]:
        self.num_collectives += 1
        self._meeting.values[self.rank] = value
        try:
            self._meeting.barrier.wait()
            values = list(self._meeting.values)
            self._meeting.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise GroupBrokenError(f"rank {self.rank} waited for the others") from error
        return values

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor)).sum(dim=0)

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        parts = self._exchange(tensor)
        assert [part.shape[-1] for part in parts] == list(sizes)
        return torch.cat(parts, dim=-1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        values = self._exchange(tensor)
        assert len({(value.shape, value.dtype) for value in values}) == 1
        return values[0].clone()

    def gather_values(self, values: Sequence[int]) -> list[list[int]]:
        gathered = [list(each) for each in self._exchange(values)]
        assert len({len(each) for each in gathered}) == 1
        return gathered

    def fails_together(self) -> bool:
        """Whoever fails alone is gone for the others."""
        meeting, self.num_failures = self._meeting, self.num_failures + 1
        ranks = meeting.failed.setdefault((self.num_failures, self.num_collectives), set())
        with meeting.changed:
            ranks.add(self.rank)
            meeting.changed.notify_all()
            agrees = meeting.changed.wait_for(lambda: len(ranks) == self.world_size, _FAIL_S)
        if not agrees:
            meeting.barrier.abort()
        return agrees


def run_ranks(world_size: int, work: Callable[[ThreadGroup], Result]) -> list[Result]:
    """Run ``work`` on each rank at once and return the results by rank; the first error wins."""
    meeting = Meeting(world_size)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(meeting, rank))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, GroupBrokenError)), errors[0])
    return results
