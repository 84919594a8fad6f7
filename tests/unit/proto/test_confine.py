"""Processes that give way say so of themselves, and of their session, which counts first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux has what this is about")

_CODE = """
import os, pathlib
from lorax_contract.confine import compute_less
compute_less({nice})
path = pathlib.Path("/proc/self/autogroup")
print(os.nice(0), os.sched_getscheduler(0), path.read_text() if path.exists() else "")
"""


@pytest.mark.parametrize(
    ("nice", "policy"), [(0, "SCHED_OTHER"), (7, "SCHED_BATCH"), (19, "SCHED_IDLE")]
)
def test_a_process_and_its_session_give_way(nice: int, policy: str) -> None:
    said = subprocess.run(
        [sys.executable, "-c", _CODE.format(nice=nice)],
        start_new_session=True, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    own, scheduler, *session = said.split()
    assert int(own) == min(os.nice(0) + nice, 19)
    assert int(scheduler) == getattr(os, policy)
    if session and nice and Path("/proc/self/autogroup").exists():
        assert session[-1] == str(nice)
