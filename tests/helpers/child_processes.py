"""Processes that come and go while somebody looks at them."""

from __future__ import annotations

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """Return the words that started a process; none if it has ended meanwhile."""
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.NoSuchProcess:
        return []


def running_children(words: str, parent: psutil.Process | None = None) -> list[psutil.Process]:
    """Return who runs below a process, this one if none is named, by words of the command line."""
    found = (parent or psutil.Process()).children(recursive=True)
    return [each for each in found if words in " ".join(command_line(each))]


def running_forks(words: str) -> list[psutil.Process]:
    """Return of the same those that one of them forked."""
    found = running_children(words)
    return [each for each in found if each.ppid() in {other.pid for other in found}]
