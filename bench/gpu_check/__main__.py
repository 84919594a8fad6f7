"""The command: every stage in a process of its own, then JSON, a Markdown page and its logs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu_check import machine
from bench.gpu_check.plan import PARTS, RANK_STAGES, STAGES, CheckStage
from bench.gpu_check.report import FAILED, SKIPPED, to_markdown

_GRACE_S = 5.0
# The small form shows that the check runs, on whatever CPUs are left for it.
_SMALL_PATIENCE = 5
_HOUSES = ("", "proto", "router", "shard", "launcher", "bench")


def run_stage(
    stage: CheckStage, log: Path, *, small: bool, budget_s: float, ranks: int | None = None
) -> dict[str, Any]:
    """Run a stage within its budget; whatever happens to it, something comes back.

    ``ranks`` is for the stages of a machine with several GPUs.
    """
    path = log.with_suffix(".json")
    command = [sys.executable, "-m", "bench.gpu_check.run_stage", stage.module, str(path)]
    command += ["--small"] * small + (["--ranks", str(ranks)] if ranks else [])
    started = time.perf_counter()
    ended = "ended without a report"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=machine.ROOT, env=environment(small),
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
    chosen = parser.add_mutually_exclusive_group()
    parser.add_argument("--ranks", type=int, help="check so many ranks, a GPU each, and only that")
    chosen.add_argument("--part", type=int, choices=PARTS, help="what one short call does")
    chosen.add_argument("--stages", help="names, with commas")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--budget", type=float, help="seconds for each stage instead of its own")
    options = parser.parse_args(arguments)
    stages = stages_of(parser, options)
    own = machine.ROOT / ("bench/out" if options.small else "bench/results")
    out = options.out or Path(os.environ.get("OUT") or own)
    facts = machine.describe(small=options.small)
    if not options.small and facts["device"] == "CPU":
        parser.error("torch sees no GPU here; --small checks the command itself on a CPU")
    if options.ranks:
        facts = facts | {"ranks": ranks_of(parser, options)}
    return run_all(
        stages, out, facts, small=options.small, part=options.part, budget=options.budget,
        ranks=options.ranks,
    )  # fmt: skip


def stages_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[CheckStage]:
    """Return the stages asked for; those of several ranks are a list of their own."""
    offered = [each for each in STAGES if options.part in (None, each.part)]
    if options.ranks:
        if options.part:
            parser.error("--ranks has no parts; --stages restricts it")
        offered = list(RANK_STAGES)
    if not options.stages:
        return offered
    names = options.stages.split(",")
    if unknown := sorted(set(names) - {stage.name for stage in offered}):
        parser.error(f"no such stage: {', '.join(unknown)}")
    return [stage for stage in offered if stage.name in names]


def ranks_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return how many ranks there are and by what they meet; ends where there are too few GPUs."""
    import torch

    if options.ranks < 2:
        parser.error("--ranks compares several with one: 2 or more")
    if options.small:
        return f"{options.ranks} over gloo, on CPUs"
    found = torch.cuda.device_count()
    if found < options.ranks:
        parser.error(
            f"{options.ranks} ranks need a GPU each, and torch sees {found}; --small checks the "
            "command itself over gloo"
        )
    return f"{options.ranks} over nccl"


def run_all(
    stages: Sequence[CheckStage],
    out: Path,
    facts: dict[str, str],
    *,
    small: bool,
    part: int | None,
    budget: float | None,
    ranks: int | None = None,
) -> int:
    """Run stages and write what they found after each, so that it stays when the rest is cut."""
    out.mkdir(parents=True, exist_ok=True)
    name = "gpu-check" + "-small" * small + (f"-part-{part}" if part else "")
    name += f"-ranks-{ranks}" if ranks else ""
    document: dict[str, Any] = {"machine": facts, "small": small, "stages": []}
    logs = out / f"{name}.log"
    logs.write_text("")
    for stage in stages:
        print(f"== {stage.title}", flush=True)
        log = out / f"{name}.{stage.name}.running"
        budget_s = budget or stage.budget_s * (_SMALL_PATIENCE if small else 1)
        result = run_stage(stage, log, small=small, budget_s=budget_s, ranks=ranks)
        document["stages"].append(result)
        words = log.read_text(errors="replace")
        with logs.open("a") as file:
            file.write(f"== {stage.name}: {result['status']}\n{words}\n")
        for scratch in (log, log.with_suffix(".json")):
            scratch.unlink(missing_ok=True)
        if result["status"] == FAILED:
            print("\n".join(words.splitlines()[-30:]))
        print(f"   {result['status']} after {result['seconds']} s {result['text']}", flush=True)
        (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (out / f"{name}.md").write_text(to_markdown(document))
    ends = [stage["status"] for stage in document["stages"]]
    print(f"{out / name}.md: {ends.count('ok')} ok, {ends.count(FAILED)} failed, "
          f"{ends.count(SKIPPED)} skipped")  # fmt: skip
    return int(FAILED in ends)


if __name__ == "__main__":
    sys.exit(main())
