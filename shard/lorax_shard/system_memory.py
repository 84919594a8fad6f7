"""What memory the system has for this process, within the limits of its container."""

from __future__ import annotations

from pathlib import Path

import psutil

# Limit, usage, and the name of what of the usage can be had back.
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
_UNLIMITED = 2**62


def total_bytes() -> int:
    """Return the bytes that there are."""
    return min(int(psutil.virtual_memory().total), _cgroup_bytes()[0])


def available_bytes() -> int:
    """Return the bytes that can be had."""
    return min(int(psutil.virtual_memory().available), _cgroup_bytes()[1])


def _cgroup_bytes() -> tuple[int, int]:
    """Return the container's limit and what it leaves; huge numbers when there is no limit."""
    for limit_file, usage_file, reclaimable in _CGROUP_FILES:
        try:
            limit, usage = int(Path(limit_file).read_text()), int(Path(usage_file).read_text())
            stat = Path(usage_file).with_name("memory.stat").read_text()
        except (OSError, ValueError):  # no such cgroup, or a limit of "max"
            continue
        pages = dict(line.split() for line in stat.splitlines())
        return limit, max(0, limit - usage + int(pages.get(reclaimable, 0)))
    return _UNLIMITED, _UNLIMITED
