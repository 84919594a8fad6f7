"""The command: every stage in a process of its own, then JSON and a Markdown page."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu_check import machine
from bench.gpu_check.plan import BY_NAME, STAGES, CheckStage
from bench.gpu_check.report import FAILED, SKIPPED, to_markdown

_GRACE_S = 5.0
_HOUSES = ("", "proto", "router", "shard", "launcher")


def run_stage(stage: CheckStage, log: Path, *, small: bool, budget_s: float) -> dict[str, Any]:
    """Run a stage within its budget; whatever happens to it, something comes back."""
    path = log.with_suffix(".json")
    command = [sys.executable, "-m", "bench.gpu_check.run_stage", stage.module, str(path)]
    started = time.perf_counter()
    ended = "ended without a report"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *(["--small"] if small else [])], cwd=machine.ROOT, env=environment(small),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(budget_s)
            ended = f"ended with code {code}"
        except subprocess.TimeoutExpired:
            ended = f"was cut after {budget_s:g} s"
        finally:
            end_group(process)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result = {"notes": [], "tables": [], "text": "", "status": "running", **found}
    if result["status"] == "running":
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        result.update(status=FAILED, text=f"it {ended}; its last words: {' / '.join(last)}")
    seconds = round(time.perf_counter() - started, 1)
    return {
        **result,
        "stage": stage.name,
        "title": stage.title,
        "seconds": seconds,
        "budget_s": budget_s,
    }


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a stage with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_GRACE_S)
        except (ProcessLookupError, PermissionError):
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def environment(small: bool) -> dict[str, str]:
    """Return the stages' environment: the checkout is importable, nothing asks a hub."""
    paths = [str(machine.ROOT / house) for house in _HOUSES]
    inherited = os.environ.get("PYTHONPATH")
    values = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    values.pop("TRITON_INTERPRET", None)
    if small:
        values |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages asked for; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--stages", default=",".join(BY_NAME), help="names, with commas")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--budget", type=float, help="seconds for each stage instead of its own")
    options = parser.parse_args(arguments)
    names = options.stages.split(",")
    if unknown := sorted(set(names) - set(BY_NAME)):
        parser.error(f"no such stage: {', '.join(unknown)}")
    own = machine.ROOT / ("bench/out" if options.small else "bench/results")
    out = options.out or Path(os.environ.get("OUT") or own)
    out.mkdir(parents=True, exist_ok=True)
    facts = machine.describe(small=options.small)
    if not options.small and facts["device"] == "CPU":
        parser.error("torch sees no GPU here; --small checks the command itself on a CPU")
    document: dict[str, Any] = {"machine": facts, "small": options.small, "stages": []}
    stem = "gpu-check-small" if options.small else "gpu-check"
    with tempfile.TemporaryDirectory() as logs:
        for stage in (stage for stage in STAGES if stage.name in names):
            print(f"== {stage.title}", flush=True)
            log = Path(logs) / f"{stage.name}.log"
            budget_s = options.budget or stage.budget_s
            result = run_stage(stage, log, small=options.small, budget_s=budget_s)
            document["stages"].append(result)
            if result["status"] == FAILED:
                print("\n".join(log.read_text(errors="replace").splitlines()[-30:]))
            print(f"   {result['status']} after {result['seconds']} s {result['text']}", flush=True)
            # After each, so that what is there stays when the whole run is cut.
            (out / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
            (out / f"{stem}.md").write_text(to_markdown(document))
    ends = [stage["status"] for stage in document["stages"]]
    print(f"{out / stem}.md: {ends.count('ok')} ok, {ends.count(FAILED)} failed, "
          f"{ends.count(SKIPPED)} skipped")  # fmt: skip
    return int(FAILED in ends)


if __name__ == "__main__":
    sys.exit(main())
