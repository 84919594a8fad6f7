"""The contract suites of the kernels, and the tests that need a GPU, by backend.

Most of the time goes into compiling kernels, which one process does one after the other: the
tests are dealt out to several.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bench.gpu_check.machine import ROOT
from bench.gpu_check.report import FAILED, Report

SUITES = ("tests/contract/attention", "tests/contract/fused", "tests/contract/lora", "tests/unit/lora/test_triton.py",
          "tests/gpu")  # fmt: skip
# What a GPU computes; torch's own backends are the CPU suite's.
_ON_A_GPU = "triton or flash or fp8 or gpu"
# A few of each, where nothing but the stage itself is in question.
_SMALL = "distinct or come_and_go"
_MOST_PROCESSES = 12
_BACKENDS = ("flash", "triton", "sdpa", "torch", "cpp", "cpu")
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def run(report: Report, *, small: bool) -> None:
    """Run the suites by pytest and count what came out."""
    tests = collect(_SMALL if small else _ON_A_GPU)
    num = 2 if small else min(_MOST_PROCESSES, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"junit-{number}.xml" for number in range(num)]
        processes = [
            subprocess.Popen([*_PYTEST, f"--junitxml={path}", *tests[number::num]], cwd=ROOT)
            for number, path in enumerate(paths)
        ]
        codes = [process.wait() for process in processes]
        failed = tabulate(report, [ET.parse(path).getroot() for path in paths if path.exists()])
    if failed or any(codes):
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        words = f"{len(failed)} tests failed: {'; '.join(failed[:5])}{more}"
        report.end(FAILED, words if failed else f"pytest ended with codes {codes}")


def collect(expression: str) -> list[str]:
    """Return the names of the tests that the suites have and the expression selects."""
    command = [*_PYTEST, "--collect-only", "-k", expression, *suites()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    if not tests:
        raise RuntimeError(f"there are no tests: {done.stdout[-500:]} {done.stderr[-500:]}")
    return tests


def suites() -> list[str]:
    """Return the suites that this checkout has."""
    return [suite for suite in SUITES if (ROOT / suite).exists()]


def tabulate(report: Report, roots: Iterable[ET.Element]) -> list[str]:
    """Count the tests of each file and backend; return the failures in a line each."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    failed, reasons = [], Counter[str]()
    for case in (case for root in roots for case in root.iter("testcase")):
        suite = case.get("classname", "").removeprefix("tests.")
        name = case.get("name", "")
        end = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if end is None else "skipped" if end.tag == "skipped" else "failed"
        counts.setdefault((suite, backend_of(name)), Counter())[outcome] += 1
        message = "" if end is None else (end.get("message") or "").splitlines()[0][:200]
        if outcome == "failed":
            failed.append(f"{suite}::{name}: {message}")
        elif outcome == "skipped":
            reasons[message] += 1
    report.table("Tests", ("suite", "backend", "passed", "failed", "skipped"))
    for (suite, backend), count in sorted(counts.items()):
        report.row(suite, backend, count["passed"], count["failed"], count["skipped"])
    for message, count in reasons.most_common():
        report.note(f"{count} skipped: {message}")
    return failed


def backend_of(name: str) -> str:
    """Return the backend that a test's parameters name; empty when they name none."""
    parameters = re.split(r"[\[\]-]", name)[1:]
    return next((each for each in parameters if each in _BACKENDS), "")
