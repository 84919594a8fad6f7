"""``lorax-bench`` starts the whole server, measures it, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
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
    assert not [
        process
        for process in psutil.process_iter(["cmdline"])
        if any("lorax-bench-" in word for word in process.info["cmdline"] or ())
        and str(tiny_model) in process.info["cmdline"]
    ]
