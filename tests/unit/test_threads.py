"""Threads that compute together: they are given back, and do not look for each other for long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


# What OpenMP says of itself when it is loaded, after what a shard does before it loads anything.
_AT_START = "from lorax_shard.ahead import let_waiting_threads_sleep as let; let(); import torch"


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '4000'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_a_thread_looks_for_others_only_briefly(set_by_user: dict[str, str], expected: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    found = subprocess.run(
        [sys.executable, "-c", _AT_START], capture_output=True, text=True, check=True, timeout=120,
        env=inherited | set_by_user | {"OMP_DISPLAY_ENV": "VERBOSE"},
    )  # fmt: skip
    assert expected in found.stderr


# A shard that has no weights: it ends while it loads, behind what OpenMP says of itself.
_SHARD = """
import os, sys
from lorax_contract.config import ShardConfig
from lorax_shard import app

def load(*_):
    print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules)
    app.leave(0)

app.load_parts = load
app.run(ShardConfig(model_dir="x", model_id="x", shard_uris=["unix:" + sys.argv[1]]).to_json())
"""


def test_a_shard_says_so_before_it_loads_torch(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    found = subprocess.run(
        [sys.executable, "-c", _SHARD, f"{tmp_path}/s"], capture_output=True, text=True,
        timeout=120, env=environment,
    )  # fmt: skip
    assert found.stdout == "4000 False\n", found.stderr


_CORES = """
import ctypes, os, struct
import numpy as np
from lorax_shard.model.programs import operations as place

known, reason = place.operations()
if known is None:
    print("no compiler:", reason)
    raise SystemExit
library, _ = place.load_library(place._SOURCE, *place._FLAGS)
before, num = os.sched_getaffinity(0), {num_threads}
a, b, out = (np.full(1 << 20, each, np.float32) for each in (1, 2, 0))
fields = np.frombuffer(struct.pack("=5q", a.ctypes.data, b.ctypes.data, out.ctypes.data, a.size, num), np.int64)
kernels = np.array([ctypes.cast(library.lorax_add_team, ctypes.c_void_p).value], np.int64)
known.run(
    kernels.ctypes.data, np.zeros(1, np.int64).ctypes.data, np.zeros(1, np.int8).ctypes.data, 1,
    fields.ctypes.data, num, None,
)
others = [os.sched_getaffinity(int(each)) for each in os.listdir("/proc/self/task")]
alone = [min(each) for each in others if len(each) == 1]
print(bool((out == 3).all()), os.sched_getaffinity(0) == before, len(alone), len(set(alone)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has what this is about")
@pytest.mark.parametrize("more", [0, 1])
def test_a_team_of_all_cores_has_each_on_its_own(more: int) -> None:
    """Its first thread is the caller's, which may run anywhere again; a larger team goes anywhere."""
    num = len(os.sched_getaffinity(0))
    if num == 1:
        pytest.skip("there is one core")
    found = subprocess.run(
        [sys.executable, "-c", _CORES.format(num_threads=num + more)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": str(num)},
    ).stdout  # fmt: skip
    if found.startswith("no compiler"):
        pytest.skip(found)
    num_pinned = 0 if more else num - 1
    assert found.split() == ["True", "True", str(num_pinned), str(num_pinned)]
