"""A comparison as a user runs it: this server beside transformers, on a few short requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).parent / "lorax-bench"


@pytest.mark.slow
def test_this_server_is_compared_with_static_batches_and_peft(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = [
        str(PROGRAM), "compare", "--workload", "mixed,requests=4,prompt=4-12,output=2-8",
        "--adapters", "0,2", "--peers", "static,continuous,peft", "--rounds", "2", "--json", str(path),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())
    runs = [(run["system"], run["num_adapters"]) for run in found["runs"]]
    assert {
        (name, num): runs.count((name, num)) for name, num in runs
    } == {
        ("ours", 0): 2, ("static", 0): 2, ("continuous", 0): 2, ("ours", 2): 2, ("peft", 2): 1,
    }  # fmt: skip
    assert not any(run["figures"]["num_failed"] for run in found["runs"])
    # Three measures of three pairs; static batches have no time between tokens.
    assert len(found["ratios"]) == 7
    assert all(each["low"] <= each["high"] and each["value"] > 0 for each in found["ratios"])
    assert found["machine"]
    assert "ours / peft" in done.stdout
