"""The collectives between real processes, over gloo."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tests.helpers.server import free_port

from lorax_contract.errors import StartupError
from lorax_shard.parallel import group as group_module
from lorax_shard.parallel.group import GroupBrokenError, TorchGroup

SIZES = (3, 1, 2)


def run_ranks(work: Callable[..., None], *arguments: Any, num: int) -> None:
    """Run a rank in each of some processes, which are forked where torch is imported already."""
    multiprocessing.set_forkserver_preload([group_module.__name__])
    mp.start_processes(work, arguments, nprocs=num, start_method="forkserver")


def work(rank: int, rendezvous: str) -> None:
    group = TorchGroup(
        rank, len(SIZES), rendezvous, torch.device("cpu"), timeout_s=60.0, meeting_s=60.0
    )
    try:
        # A view that is not contiguous, as a module's output may be.
        summed = group.all_reduce(torch.full((4, 2), float(rank + 1)).t())
        assert summed.shape == (2, 4)
        assert (summed == 6.0).all()
        own = torch.arange(SIZES[rank], dtype=torch.float32).expand(2, -1) + 10 * rank
        gathered = group.all_gather(own, SIZES)
        assert gathered.tolist() == [[0.0, 1.0, 2.0, 10.0, 20.0, 21.0]] * 2
        told = torch.tensor([7, -1, 2**40] if rank == 0 else [0, 0, 0])
        assert group.broadcast(told).tolist() == [7, -1, 2**40]
        assert group.gather_values([rank, -rank]) == [[0, 0], [1, -1], [2, -2]]
    finally:
        group.close()


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_three_processes_meet(kind: str, tmp_path: Path) -> None:
    place = f"tcp://127.0.0.1:{free_port()}" if kind == "tcp" else f"file://{tmp_path}/meeting"
    run_ranks(work, place, num=len(SIZES))


def meet_beside_others(process: int, folder: str) -> None:
    """Two groups of two, at the same time and in each other's way if they could be."""
    number, rank = divmod(process, 2)
    place = f"file://{folder}/meeting-{number}"
    group = TorchGroup(rank, 2, place, torch.device("cpu"), timeout_s=60.0, meeting_s=60.0)
    try:
        for turn in range(20):
            assert group.gather_values([number, rank, turn]) == [[number, r, turn] for r in (0, 1)]
    finally:
        group.close()


def test_groups_on_one_host_do_not_meet_each_other(tmp_path: Path) -> None:
    run_ranks(meet_beside_others, str(tmp_path), num=4)


def wait_alone(rank: int, rendezvous: str, folder: str) -> None:
    """Rank 2 stands still in the middle; the others say so and end."""
    group = TorchGroup(rank, 3, rendezvous, torch.device("cpu"), timeout_s=1.0, meeting_s=60.0)
    group.gather_values([rank])
    if rank == 2:
        while len(list(Path(folder).glob("told-*"))) < 2:
            time.sleep(0.05)
        return
    with pytest.raises(GroupBrokenError) as caught:
        group.gather_values([rank])
    Path(folder, f"told-{rank}").write_text(str(caught.value))


def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    run_ranks(wait_alone, f"file://{tmp_path}/meeting", str(tmp_path), num=3)
    for rank in (0, 1):
        told = (tmp_path / f"told-{rank}").read_text()
        assert f"rank {rank} waited for the others in a step" in told
        assert "rank 2 stood still or ended" in told


def begin_early(rank: int, rendezvous: str, folder: str) -> None:
    """Two ranks begin, and go on; the third one does not before they have said so."""
    group = TorchGroup(rank, 3, rendezvous, torch.device("cpu"), timeout_s=60.0, meeting_s=60.0)
    try:
        if rank == 2:
            while len(list(Path(folder).glob("begun-*"))) < 2:
                time.sleep(0.02)
        gathered = [group.begin_gather([rank, turn]) for turn in range(3)]
        given = torch.tensor([5, -1, 2**40]) if rank == 0 else torch.zeros(3, dtype=torch.int64)
        shared = group.begin_broadcast(given)
        Path(folder, f"begun-{rank}").write_text("")
        # What comes behind is not mixed up with it.
        assert group.all_reduce(torch.ones(4)).tolist() == [3.0] * 4
        for turn, each in enumerate(gathered):
            assert each.read() == [[0, turn], [1, turn], [2, turn]]
            assert each.is_there
        shared.wait()
        assert shared.tensor.tolist() == shared.read()[0] == [5, -1, 2**40]
    finally:
        group.close()


def test_ranks_begin_without_waiting_for_those_that_have_not(tmp_path: Path) -> None:
    run_ranks(begin_early, f"file://{tmp_path}/meeting", str(tmp_path), num=3)


def fail_here_and_there(rank: int, rendezvous: str) -> None:
    """Between the same collectives passes fail together; elsewhere, or on one rank, they do not."""
    group_module._FAIL_S = 1.0
    group = TorchGroup(rank, 3, rendezvous, torch.device("cpu"), timeout_s=60.0, meeting_s=60.0)
    try:
        assert group.fails_together()
        group.gather_values([rank])
        time.sleep(0.1 * rank)
        assert group.fails_together()
        assert group.fails_together()
        if rank:
            assert not group.fails_together()
        group.gather_values([rank])
    finally:
        group.close()


def test_ranks_agree_on_passes_that_fail_at_one_place(tmp_path: Path) -> None:
    run_ranks(fail_here_and_there, f"file://{tmp_path}/meeting", num=3)


def stop_rank_0(rank: int, rendezvous: str, folder: str) -> None:
    """Rank 0 is stopped with all its threads, and so the rendezvous that it serves."""
    group = TorchGroup(rank, 2, rendezvous, torch.device("cpu"), timeout_s=1.0, meeting_s=60.0)
    if rank == 0:
        group.gather_values([os.getpid()])
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    pid = group.gather_values([rank])[0][0]
    # It is never answered, however long it waits.
    group_module._BLAME_S = group_module._ANSWER_S = 0.2
    with pytest.raises(GroupBrokenError) as caught:
        group.gather_values([rank])
    Path(folder, "told").write_text(str(caught.value))
    os.kill(pid, signal.SIGCONT)
    # As a shard ends that has lost the others: a thread may still wait for the rendezvous.
    os._exit(0)


def test_rank_0_is_named_when_the_rendezvous_stands_still_with_it(tmp_path: Path) -> None:
    run_ranks(stop_rank_0, f"tcp://127.0.0.1:{free_port()}", str(tmp_path), num=2)
    assert "rank 0 stood still or ended" in (tmp_path / "told").read_text()


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"waited 0\.1 s .*: ranks 1, 2 did not come"):
        TorchGroup(
            0, 3, f"file://{tmp_path}/meeting", torch.device("cpu"), timeout_s=1, meeting_s=0.1
        )
