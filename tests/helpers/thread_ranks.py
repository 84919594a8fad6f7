"""Ranks as threads of one process: a RankGroup without sockets, and a way to run one per rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from lorax_shard.parallel.group import GroupBrokenError

Result = TypeVar("Result")


class Meeting:
    """Where the threads of a group exchange values."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.values: list[Any] = [None] * world_size
        # By place: the ranks whose pass failed there.
        self.failed: dict[tuple[int, int], set[int]] = {}
        # By collective that was begun and not waited for: what each rank gave.
        self.given: dict[int, dict[int, torch.Tensor]] = {}
        self.changed = threading.Condition()
        # How long a rank whose pass failed waits for the others to say the same.
        self.fail_s = 60.0


class ArrivingSoon:
    """Implements Arriving: what some ranks of a meeting give in one collective."""

    def __init__(self, meeting: Meeting, number: int, ranks: Sequence[int]) -> None:
        self._meeting, self._ranks = meeting, ranks
        self._given = meeting.given.setdefault(number, {})
        self._tensors: list[torch.Tensor] = []

    @property
    def tensor(self) -> torch.Tensor:
        if not self._tensors:
            # Nobody may look at it yet.
            self._tensors = [torch.full_like(next(iter(self._given.values())), -9)]
        return self._tensors[0]

    @property
    def is_there(self) -> bool:
        return all(rank in self._given for rank in self._ranks)

    def wait(self) -> None:
        with self._meeting.changed:
            arrived = self._meeting.changed.wait_for(
                lambda: self._meeting.barrier.broken or self.is_there, 60
            )
        if not (arrived and self.is_there):
            raise GroupBrokenError("a rank waited for the others")
        self.tensor.copy_(self._given[self._ranks[0]])

    def read(self) -> list[list[int]]:
        self.wait()
        return [self._given[rank].tolist() for rank in self._ranks]


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

    def begin_broadcast(self, tensor: torch.Tensor) -> ArrivingSoon:
        return self._begin(tensor, [0])

    def begin_gather(self, values: Sequence[int]) -> ArrivingSoon:
        return self._begin(torch.tensor(list(values)), range(self.world_size))

    def _begin(self, tensor: torch.Tensor, ranks: Sequence[int]) -> ArrivingSoon:
        self.num_collectives += 1
        with self._meeting.changed:
            arriving = ArrivingSoon(self._meeting, self.num_collectives, ranks)
            given = arriving._given
            assert all(
                (each.shape, each.dtype) == (tensor.shape, tensor.dtype) for each in given.values()
            )
            given[self.rank] = tensor.clone()
            self._meeting.changed.notify_all()
        return arriving

    def fails_together(self) -> bool:
        """Whoever fails alone is gone for the others."""
        meeting, self.num_failures = self._meeting, self.num_failures + 1
        ranks = meeting.failed.setdefault((self.num_failures, self.num_collectives), set())
        with meeting.changed:
            ranks.add(self.rank)
            meeting.changed.notify_all()
            agrees = meeting.changed.wait_for(lambda: len(ranks) == self.world_size, meeting.fail_s)
        if not agrees:
            meeting.barrier.abort()
            with meeting.changed:
                meeting.changed.notify_all()
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
