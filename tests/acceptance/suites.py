"""Test files as evidence: what ran, by backend, and why something did not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.acceptance.harness import Result

ROOT = Path(__file__).parents[2]
LEAST_FAMILIES = 20
# The first parameter of a contract test is its backend; a file of one backend is named after it.
BACKENDS = ("torch", "cpp", "tiles", "cpu", "sdpa", "flash", "triton")


_VERSIONS = """
import platform
from importlib.metadata import version
names = ("torch", "triton", "numpy", "transformers")
print(f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names), sep=", ")
"""


@dataclass(frozen=True, slots=True)
class SuiteRun:
    """What pytest made of some files."""

    returncode: int
    # What tests print with FIGURE.
    figures: list[str]
    # Name of each test, with its parameters, and how it ended: passed, skipped or failed.
    ends: list[tuple[str, str]] = field(default_factory=list)
    # Why tests were skipped, and how many for each reason.
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> Counter[str]:
        """How many tests ended in which way."""
        return Counter(end for _, end in self.ends)

    @property
    def is_clean(self) -> bool:
        """Whether something passed, and nothing failed."""
        counts = self.counts
        return self.returncode == 0 and counts["passed"] > 0 and not counts["failed"]

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out besides."""
        return self.is_clean and not self.counts["skipped"]


def figures_of(output: str) -> list[str]:
    """Return what tests printed with FIGURE, at most behind pytest's own dots.

    A failed test's source, which is printed too, has the word within a line.
    """
    return re.findall(r"^[.sxXFE]*FIGURE (.*)", output, re.MULTILINE)


def run_suite(*arguments: str, env: dict[str, str] | None = None) -> SuiteRun:
    """Run pytest on some files, slow tests included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        # A busy machine may hold any test up for minutes: what is judged here is what it computes.
        options = ["-q", "-s", "-p", "no:cacheprovider", "--timeout=1800", f"--junitxml={path}"]
        options += ["-m", ""]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *arguments],
            cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | (env or {}),
        )  # fmt: skip
        if run.returncode:
            print(run.stdout[-4000:], run.stderr[-1000:], flush=True)
        found = SuiteRun(run.returncode, figures_of(run.stdout))
        cases = ET.parse(path).getroot().iter("testcase") if path.exists() else ()
        for case in cases:
            name = f"{case.get('classname')}::{case.get('name')}"
            end = next((e for e in case if e.tag in ("failure", "error", "skipped")), None)
            if end is None:
                found.ends.append((name, "passed"))
            elif end.tag == "skipped":
                found.ends.append((name, "skipped"))
                found.reasons[end.get("message", "")] += 1
            else:
                found.ends.append((name, "failed"))
    return found


def backend_of(test: str) -> str:
    """Return the backend that a contract test is about; "all" where it is about none of its own."""
    module, _, name = test.partition("::")
    words = re.split(r"[\[\]-]", name.partition("[")[2])
    first = words[0] if words else ""
    named = module.rpartition("test_")[2]
    return next((each for each in (first, named) if each in BACKENDS), "all")


def point_contracts() -> Result:
    """The contract suites of attention and LoRA on all backends."""
    parts, is_clean = [], True
    for suite in ("attention", "lora"):
        run = run_suite(f"tests/contract/{suite}")
        is_clean = is_clean and run.is_clean
        by_backend: dict[str, Counter[str]] = {}
        for test, end in run.ends:
            by_backend.setdefault(backend_of(test), Counter())[end] += 1
        for backend, counts in sorted(by_backend.items()):
            shown = ", ".join(f"{number} {end}" for end, number in sorted(counts.items()))
            print(f"    {suite}, {backend}: {shown}", flush=True)
        for reason, number in run.reasons.items():
            print(f"    {suite}: {number} skipped: {reason}", flush=True)
        passed = ", ".join(f"{b} {by_backend[b]['passed']}" for b in sorted(by_backend))
        counts = run.counts
        parts.append(
            f"{suite}: {counts['passed']} passed ({passed}), {counts['skipped']} skipped, "
            f"{counts['failed']} failed"
        )
    return Result(is_clean, "; ".join(parts))


def point_families() -> Result:
    """Every tested family with two adapters; what is refused; RoPE of each kind."""
    from lorax_shard.model.families import TESTED_FAMILIES

    run = run_suite(*sorted(str(path) for path in ROOT.glob("tests/integration/test_families*.py")))
    # "gemma2 3.6e-06" on one rank, "gemma2 on 3 ranks 4.0e-06" on several.
    found = [each.rpartition(" ")[::2] for each in run.figures]
    largest = {name: float(value) for name, value in found}
    families = {name.partition(" ")[0] for name in largest}
    worst = max(largest, key=largest.__getitem__, default="none")
    print("    " + ", ".join(f"{name} {value:.1e}" for name, value in sorted(largest.items())))
    ok = run.is_clean and families == TESTED_FAMILIES and len(families) >= LEAST_FAMILIES
    figure = (
        f"{len(families)} families, largest relative difference {largest.get(worst, 0.0):.1e} "
        f"({worst}); {run.counts['passed']} tests passed, {run.counts['skipped']} skipped, "
        f"{run.counts['failed']} failed"
    )
    return Result(ok, figure)


def point_namespaces() -> Result:
    """Ranks in two network namespaces; the reason where they cannot be made."""
    run = run_suite("tests/e2e/test_namespaces.py")
    skipped = "; ".join(run.reasons)
    figure = f"skipped: {skipped}" if skipped else f"{run.counts['passed']} passed"
    return Result(run.returncode == 0 and not run.counts["failed"], figure)


def point_gpu() -> Result:
    """``make gpu-check``: in full where there is a GPU, else in its small form.

    ``GPU_PYTHON`` names another Python, with the releases of a machine that has a GPU.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    python = os.environ.get("GPU_PYTHON", sys.executable)
    versions = subprocess.run(
        [python, "-c", _VERSIONS], text=True, capture_output=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        # A GPU's table is a result to keep; that of the small form shows nothing but that it runs.
        words = [] if has_gpu else [f"ARGS=--small --out {folder}"]
        run = subprocess.run(
            ["make", "gpu-check", f"GPU_PYTHON={python}", *words],
            cwd=ROOT, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    print("\n".join(f"    {line}" for line in run.stdout.splitlines()[-40:]), flush=True)
    ends = re.findall(r"^   (ok|failed|skipped) after", run.stdout, re.MULTILINE)
    counts = ", ".join(f"{number} {end}" for end, number in Counter(ends).items())
    where = (
        torch.cuda.get_device_name() if has_gpu else "no GPU is at hand; its small form on a CPU"
    )
    return Result(run.returncode == 0 and "ok" in ends, f"{where}, {versions}: stages {counts}")
