"""Kubernetes' manifests: rendered by kubectl, beside schemas, linters and the code."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tests.acceptance.environments import environment
from tests.acceptance.harness import Result
from tests.acceptance.suites import run_suite
from tests.helpers.manifests.rendering import Manifest, render

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "kubernetes"
VALIDATOR = "kubernetes-validate==1.37.0"
# The three newest whose schemas the validator has.
VERSIONS = ("1.35", "1.36", "1.37")
# Of APIs that a cluster gets from elsewhere: they have no place in Kubernetes' own schemas.
FOREIGN = {"Gateway", "HTTPRoute", "InferencePool", "PodMonitor"}


def point_manifests() -> Result:
    """Render, compare with our own renderer, validate, lint, and compare with the code."""
    if shutil.which("kubectl") is None:
        return Result(False, "there is no kubectl on the path, which renders the overlays")
    with tempfile.TemporaryDirectory() as name, environment(VALIDATOR) as programs:
        files = dict(rendered(Path(name)))
        apart = [what for what, (path, own) in files.items() if _by_name(path) != _named(own)]
        invalid = [
            f"{what} on {version}"
            for what, (path, _) in files.items()
            for version in VERSIONS
            if not is_valid(programs, path, version)
        ]
        is_strict = not is_valid(
            programs, _with_a_fault(next(iter(files.values()))[0]), VERSIONS[-1]
        )
    suites = {
        "manifests and code": run_suite("tests/unit/deploy/test_manifests.py"),
        "images": run_suite("tests/architecture/test_containers.py"),
        "read-only": run_suite("tests/e2e/test_read_only.py"),
    }
    ends = [
        f"{what}: {run.counts['passed']} passed, {run.counts['skipped']} skipped, "
        f"{run.counts['failed']} failed"
        for what, run in suites.items()
    ]
    figure = (
        f"{len(files)} folders rendered ({len(apart)} not as the tests render them), "
        f"{len(invalid)} invalid on {', '.join(VERSIONS)}, a planted fault "
        f"{'found' if is_strict else 'NOT found'}; {'; '.join(ends)}"
    )
    print(*(f"    {each}" for each in [*apart, *invalid]), sep="\n", flush=True)
    ok = is_strict and not apart and not invalid and all(run.is_clean for run in suites.values())
    return Result(ok, figure)


def rendered(scratch: Path) -> Iterator[tuple[str, tuple[Path, list[Manifest]]]]:
    """Yield each folder's name, what kubectl makes of it, and what our renderer does.

    Components are put over the server of one GPU, each alone and all together.
    """
    components = sorted(path.parent for path in FOLDER.glob("components/*/kustomization.yaml"))
    base = FOLDER / "overlays" / "gpu"
    for folder in [*sorted(FOLDER.glob("overlays/*")), FOLDER / "ray"]:
        yield folder.name, (kubectl(folder, scratch), render(folder))
    for chosen in [*([each] for each in components), components]:
        name = "gpu with " + ", ".join(each.name for each in chosen)
        own = scratch / name.replace(", ", "-").replace(" ", "-")
        own.mkdir()
        document = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(base, own.resolve())],
            "components": [os.path.relpath(each, own.resolve()) for each in chosen],
        }
        (own / "kustomization.yaml").write_text(yaml.safe_dump(document))
        yield name, (kubectl(own, scratch), render(base, *chosen))


def kubectl(folder: Path, scratch: Path) -> Path:
    """Render a folder into a file, without network, and return it."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"kubectl kustomize {folder}: {done.stderr.strip()}")
    path = scratch / f"{folder.name}.yaml"
    path.write_text(done.stdout)
    return path


def is_valid(programs: Path, path: Path, version: str) -> bool:
    """Whether all manifests follow a version's schemas, unknown fields forbidden."""
    done = subprocess.run(
        [programs / "kubernetes-validate", "-k", version, "--strict", "--quiet", path],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    unknown = [line for line in (done.stdout + done.stderr).splitlines() if "find schema" in line]
    strange = [line for line in unknown if line.split(" kind ")[1].split()[0] not in FOREIGN]
    if done.returncode or strange:
        print(f"    {path.name}, {version}: {done.stdout}{done.stderr}", flush=True)
    return done.returncode == 0 and not strange


def _with_a_fault(path: Path) -> Path:
    """Return the file with a field that no version knows."""
    text = path.read_text()
    assert "runAsNonRoot" in text
    wrong = path.with_name("wrong.yaml")
    wrong.write_text(text.replace("runAsNonRoot", "runAsNobody"))
    return wrong


def _by_name(path: Path) -> dict[tuple[str, str], Any]:
    return _named(yaml.safe_load_all(path.read_text()))


def _named(manifests: Any) -> dict[tuple[str, str], Any]:
    return {(each["kind"], each["metadata"]["name"]): each for each in manifests}
