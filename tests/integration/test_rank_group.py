"""The collectives between real processes, over gloo."""

from __future__ import annotations

import torch
import torch.multiprocessing as mp
from tests.helpers.server import free_port

from lorax_shard.parallel.group import TorchGroup

SIZES = (3, 1, 2)


def work(rank: int, address: str) -> None:
    group = TorchGroup(rank, len(SIZES), address, torch.device("cpu"), timeout_s=60.0)
    try:
        # A view that is not contiguous, as a module's output may be.
        summed = group.all_reduce(torch.full((4, 2), float(rank + 1)).t())
        assert summed.shape == (2, 4)
        assert (summed == 6.0).all()
        own = torch.arange(SIZES[rank], dtype=torch.float32).expand(2, -1) + 10 * rank
        gathered = group.all_gather(own, SIZES)
        assert gathered.tolist() == [[0.0, 1.0, 2.0, 10.0, 20.0, 21.0]] * 2
        assert group.broadcast([7, -1, 2**40] if rank == 0 else [0, 0, 0]) == [7, -1, 2**40]
    finally:
        group.close()


def test_three_processes_meet() -> None:
    mp.spawn(work, (f"127.0.0.1:{free_port()}",), nprocs=len(SIZES))
