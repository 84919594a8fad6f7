"""Threads that computed with a thread are given back: kept ones would slow down whoever computes."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import time
import psutil, torch
from lorax_shard.threads import release_team

def compute():
    x = torch.randn(512, 512)
    (x @ x).exp().sum()
    return psutil.Process().num_threads()

torch.set_num_threads(4)
alone = psutil.Process().num_threads()
together = compute()
release_team()
deadline = time.monotonic() + 20
while psutil.Process().num_threads() > alone and time.monotonic() < deadline:
    time.sleep(0.01)
print(alone, together, psutil.Process().num_threads(), torch.get_num_threads())
# It gets others when it asks.
print(compute() >= together)
"""


def test_a_team_is_given_back_and_made_again() -> None:
    found = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    counts, again = found.stdout.splitlines()
    alone, together, left, num_threads = map(int, counts.split())
    assert together > alone >= left
    assert num_threads == 4
    assert again == "True"
