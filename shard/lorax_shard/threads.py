"""How many threads compute."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# OpenMP 5.0: what was set stays as it is.
_SOFT = 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, for the many tiny steps of a start's checks.

    On a busy machine threads that meet after each of them wait for the scheduler every
    time: seconds become a minute.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def release_team() -> None:
    """Give back the threads that computed together with this one; it gets others when it asks.

    OpenMP keeps a team for each thread that ever asked for one. While all teams together have more
    threads than there are processors, its threads no longer look for each other but sleep and are
    woken at each of a pass's hundreds of kernels, which makes passes half as long again. So whoever
    has done its work calls this, and one team is left: of the thread that computes steps.
    """
    release = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if release is not None:
        release(_SOFT)
