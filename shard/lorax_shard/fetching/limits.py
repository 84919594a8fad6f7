"""What the process of one fetch may use, set by itself before it reads a foreign byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorax_contract import confine

# By which its own end comes after the one that its watcher gives it.
_SPARE_S = 5
_OPEN_FILES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimits:
    """Resources of one fetch."""

    # On top of what the process occupies when the fetch begins, and of the adapter's own files.
    memory_bytes: int = 2 << 30
    cpu_s: int = 300
    # From the beginning to the end, waiting included.
    deadline_s: float = 600.0
    # How much it gives way to the model's process. Where every core is busy with steps, this
    # leaves it a sixth: their tokens take at most 1.2 times as long, and a flood of adapters
    # that are not here yet still flows. At 10 it is a tenth, in the idle class nothing.
    nice: int = 7


# How often an adapter's files are mapped: by who opens them, as tensors, and changed.
_MAPPINGS = 3


def allow_files(limits: ProcessLimits, folder: Path) -> None:
    """Let this process map the files of a folder besides what it may use."""
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    confine.limit_memory(limits.memory_bytes + _MAPPINGS * size)


def apply(limits: ProcessLimits, max_file_bytes: int) -> None:
    """Limit this process: memory, CPU seconds, file size, open files, lifetime."""
    confine.limit_memory(limits.memory_bytes)
    confine.limit_cpu(limits.cpu_s)
    confine.limit_files(_OPEN_FILES, max_file_bytes + (1 << 20))
    # It would hold the caller's token.
    confine.leave_no_core()
    # Nobody may be left who would end an orphan: it ends itself.
    confine.limit_time(limits.deadline_s + _SPARE_S)
    confine.be_first_to_go()
