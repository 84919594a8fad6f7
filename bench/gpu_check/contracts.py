"""The contract suites of attention and LoRA, and the tests that need a GPU, by backend."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from bench.gpu_check.machine import ROOT
from bench.gpu_check.report import FAILED, Report

SUITES = ("tests/contract/attention", "tests/contract/lora", "tests/unit/lora/test_triton.py",
          "tests/gpu")  # fmt: skip
# A few of each, where nothing but the stage itself is in question.
_SMALL = "distinct or come_and_go or decodes"
_BACKENDS = ("flash", "triton", "sdpa", "torch", "cpp", "cpu")


def run(report: Report, *, small: bool) -> None:
    """Run the suites by pytest and count what came out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   f"--junitxml={path}", *suites()]  # fmt: skip
        if small:
            command += ["-k", _SMALL]
        elif importlib.util.find_spec("xdist"):
            # Most of the time goes into compiling kernels.
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if not path.exists():
            report.end(FAILED, f"pytest ended with code {done.returncode} and no report")
            return
        failed = tabulate(report, ET.parse(path).getroot())
    if failed or done.returncode:
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        words = f"{len(failed)} tests failed: {'; '.join(failed[:5])}{more}"
        report.end(FAILED, words if failed else f"pytest ended with code {done.returncode}")


def suites() -> list[str]:
    """Return the suites that this checkout has."""
    return [suite for suite in SUITES if (ROOT / suite).exists()]


def tabulate(report: Report, root: ET.Element) -> list[str]:
    """Count the tests of each file and backend; return the failures in a line each."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    failed, reasons = [], Counter[str]()
    for case in root.iter("testcase"):
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
