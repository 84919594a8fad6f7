"""What a process that reads or runs foreign data may use, set by itself before it does."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# What gives way to all that computes at all.
LEAST_NICE = 19
# Beside others who tell the system about their sessions.
_TRIES, _PAUSE_S = 10, 0.1


def limit_memory(num_bytes: int) -> None:
    """Let this process map so many bytes more than it has mapped now."""
    _limit(resource.RLIMIT_AS, mapped_bytes() + num_bytes)


def limit_cpu(seconds: int) -> None:
    """End this process by SIGXCPU once it has computed so long from now; a later call counts anew."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    _limit(resource.RLIMIT_CPU, used + seconds)


def limit_time(seconds: float) -> None:
    """End this process by SIGALRM after so many seconds by the clock; 0: not any more.

    Whatever it computes then: the kernel ends it, no code of its own.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def limit_files(num_open: int, max_bytes: int) -> None:
    """Bound how many files this process has open, and how large it can make one."""
    _limit(resource.RLIMIT_NOFILE, num_open)
    _limit(resource.RLIMIT_FSIZE, max_bytes)


def leave_no_core() -> None:
    """Write no core file, which would hold what others sent."""
    _limit(resource.RLIMIT_CORE, 0)


def end_with_parent() -> None:
    """End this process when the thread that started it ends, however that happens."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def be_first_to_go() -> None:
    """Ask the kernel to take this process before others when memory runs out."""
    try:
        Path("/proc/self/oom_score_adj").write_text("900")
    except OSError:
        # Not allowed in some containers: the limits still hold.
        return


def compute_less(nice: int) -> None:
    """Let this process, which leads a session, and those that it starts in it give way to others."""
    os.nice(nice)
    if sys.platform == "linux" and nice:
        # Others are not interrupted when this one has something to do again; to those that wake up
        # a core is free on which only the idle class computes.
        policy = os.SCHED_IDLE if nice >= LEAST_NICE else os.SCHED_BATCH
        os.sched_setscheduler(0, policy, os.sched_param(0))
    for _ in range(_TRIES if nice else 0):
        if session_computes_less("self", nice):
            return
        time.sleep(_PAUSE_S)


def session_computes_less(process: int | str, nice: int) -> bool:
    """Let the session of a process give way; False: the system takes this later, not now.

    Linux shares processors between sessions first, where they are not in groups of their own
    (``sched_autogroup``, see sched(7)): a process' own ``nice`` counts among those of its session only.
    """
    try:
        Path(f"/proc/{process}/autogroup").write_text(str(nice))
    except BlockingIOError:
        # Who is not root may say so ten times a second, all processes together.
        return False
    except OSError:
        # Other systems, and processes that have ended: there is nothing to say.
        return True
    return True


def mapped_bytes() -> int:
    """Return how many bytes this process has mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _limit(kind: int, value: int) -> None:
    """Set the limit that counts; the one that bounds later calls stays as it is."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
