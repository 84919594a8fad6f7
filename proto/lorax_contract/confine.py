"""What a process that reads or runs foreign data may use, set by itself before it does."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


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


def mapped_bytes() -> int:
    """Return how many bytes this process has mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _limit(kind: int, value: int) -> None:
    """Set the limit that counts; the one that bounds later calls stays as it is."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
