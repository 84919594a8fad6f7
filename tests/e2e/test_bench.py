"""``lorax-bench`` starts the whole server, measures it, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.e2e.conftest import OPTIONS


@pytest.mark.parametrize("api", ["openai", "lorax"])
def test_a_run_with_adapters_and_without(api: str, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    program = Path(sys.executable).parent / "lorax-bench"
    command = [
        str(program), "run", "fixed,requests=6,prompt=12,output=5", "--adapters", "3",
        "--retention", "--rounds", "1", "--ranks", "2,4", "--api", api, "--json", str(path),
        "--", "--model-id", str(tiny_model), *OPTIONS,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads(path.read_text())["runs"]
    assert [run["variant"] for run in runs] == ["base", "3 adapters"]
    for run in runs:
        assert run["figures"]["num_output_tokens"] == 30
        assert run["figures"]["errors"] == {}
        assert run["peak_memory_bytes"] > 1 << 20
    assert {line["output_tokens"] for line in runs[1]["adapters"].values()} == {10}
    assert not servers_of(tiny_model)


def servers_of(model: Path) -> list[psutil.Process]:
    """The launchers that a benchmark started for this model."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any("lorax-bench-" in word for word in process.info["cmdline"] or ())
        and str(model) in process.info["cmdline"]
    ]


def test_a_benchmark_that_is_ended_ends_its_server(tiny_model: Path) -> None:
    program = Path(sys.executable).parent / "lorax-bench"
    command = [
        str(program), "run", "fixed,requests=500,prompt=12,output=500", "--concurrency", "2",
        "--", "--model-id", str(tiny_model), *OPTIONS,
    ]  # fmt: skip
    bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not servers_of(tiny_model):
            assert bench.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        bench.terminate()
    assert bench.wait(120) == 143
    assert not servers_of(tiny_model)
