"""What the process of one fetch may use, set by itself before it reads a foreign byte."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

_SPARE_S = 5
_OPEN_FILES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimits:
    """Resources of one fetch."""

    # On top of what the process occupies when the fetch begins.
    memory_bytes: int = 2 << 30
    cpu_s: int = 300
    # From the beginning to the end, waiting included.
    deadline_s: float = 600.0
    # How much it gives way to the model's process.
    nice: int = 10


def apply(limits: ProcessLimits, max_file_bytes: int) -> None:
    """Limit this process: memory, CPU seconds, file size, open files, lifetime."""
    _limit(resource.RLIMIT_AS, _mapped_bytes() + limits.memory_bytes)
    # Told once, then ended: the signal between the two says which limit it was.
    _limit(resource.RLIMIT_CPU, int(_used_cpu_s()) + limits.cpu_s, spare=_SPARE_S)
    _limit(resource.RLIMIT_FSIZE, max_file_bytes + (1 << 20))
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    # A core file would hold the caller's token.
    _limit(resource.RLIMIT_CORE, 0)
    # Nobody may be left who would end an orphan: it ends itself.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits.deadline_s + _SPARE_S)
    os.nice(limits.nice)
    _be_first_to_go()


def _limit(kind: int, value: int, spare: int = 0) -> None:
    _, hard = resource.getrlimit(kind)
    most = value + spare if hard == resource.RLIM_INFINITY else min(value + spare, hard)
    resource.setrlimit(kind, (min(value, most), most))


def _mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _used_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _be_first_to_go() -> None:
    """Ask the kernel to take this process before the model's when memory runs out."""
    try:
        Path("/proc/self/oom_score_adj").write_text("900")
    except OSError:
        # Not allowed in some containers: the limits above still hold.
        return
