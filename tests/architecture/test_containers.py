"""Dockerfile and compose.yaml are right in themselves and agree with launcher and checkout.

Planted faults are found.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.helpers.container_lint import compose_problems, dockerfile_problems, inherited, stages

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text()
COMPOSE = (ROOT / "compose.yaml").read_text()

on_linux = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="hadolint's wheel holds a program for Linux on x86-64",
)


def lint(text: str) -> str:
    """Return what hadolint says of a Dockerfile."""
    program = Path(sys.executable).parent / "hadolint"
    return subprocess.run(
        [program, "--no-color", "--config", ROOT / ".hadolint.yaml", "-"],
        input=text, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip


@on_linux
def test_hadolint_finds_nothing() -> None:
    assert lint(DOCKERFILE) == ""


@on_linux
@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        ("3.12.11-slim-bookworm", "latest", "DL3007"),
        ("torch==2.13.0 ", "torch ", "DL3013"),
        ("USER 10001\n", "USER root\n", "DL3002"),
        ("COPY router router", "ADD router router", "DL3020"),
        (" \\\n    && rm -rf /var/lib/apt/lists/*", "", "DL3009"),
        ("--from=build-cpu", "--from=cpu", "DL3023"),
    ],
)
def test_hadolint_finds_a_planted_fault(before: str, after: str, rule: str) -> None:
    assert before in DOCKERFILE
    assert rule in lint(DOCKERFILE.replace(before, after))


def check_schema(path: Path) -> subprocess.CompletedProcess[str]:
    """Check a file against compose's own schema, as check-jsonschema ships it."""
    program = Path(sys.executable).parent / "check-jsonschema"
    return subprocess.run(
        [program, "--builtin-schema", "vendor.compose-spec", path],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_compose_file_follows_the_schema(tmp_path: Path) -> None:
    done = check_schema(ROOT / "compose.yaml")
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "compose.yaml"
    broken.write_text(COMPOSE.replace("stop_grace_period:", "stop_grace:", 1))
    assert "stop_grace" in check_schema(broken).stdout


def test_the_dockerfile_agrees_with_the_checkout() -> None:
    assert list(dockerfile_problems(DOCKERFILE, IGNORED, ROOT)) == []


def test_the_compose_file_agrees_with_the_launcher() -> None:
    assert list(compose_problems(COMPOSE, set(stages(DOCKERFILE)), ROOT)) == []


def test_the_images_hold_the_versions_that_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "lorax-launcher" in project["scripts"]
    python = re.search(r"FROM python:(\d+)\.(\d+)", DOCKERFILE)
    assert python is not None
    assert (3, 11) <= (int(python[1]), int(python[2])) < (3, 14)
    assert project["requires-python"] == ">=3.11,<3.14"
    pinned = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None
    found = stages(DOCKERFILE)
    for name in ("build-cpu", "build-cuda"):
        runs = [text for kind, text in inherited(found, name) if kind == "RUN"]
        assert any(f"pip install {pinned[1]} " in text for text in runs), name
        extras = re.findall(r'pip install --constraint \S+ "\.\[([\w,]+)\]"', " ".join(runs))
        assert extras, name
        assert set(",".join(extras).split(",")) <= set(project["optional-dependencies"])


def test_every_package_of_the_project_is_copied() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    copied = re.findall(r"^COPY (\w+) \w+$", DOCKERFILE, re.MULTILINE)
    assert set(setuptools["packages"]["find"]["where"]) == set(copied)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("USER 10001\n", "", "cpu runs as root"),
        ("EXPOSE 3000", "EXPOSE 8080", "cpu exposes 8080"),
        (', "--hostname", "0.0.0.0"', "", "cpu listens inside the container only"),
        (":3000/health", ":3000/ready", "asks no /health"),
        ("AS cuda\n", "AS gpu\n", "there is no target cuda"),
        ("COPY router router", "COPY routers router", "COPY routers, which does not exist"),
        ("COPY router router", "COPY tests tests", "COPY tests, which .dockerignore leaves out"),
        ('"--json-output"', '"--json-logs"', "--json-logs"),
        ('"--port", "3000"', '"--port", "80"', "it listens on 80"),
        ('"/adapters"]\nUSER', '"/lora"]\nUSER', "/adapters is no volume"),
        ("HF_HOME=/data/hub", "HF_HOME=/hub", "keeps HF_HOME in no volume"),
        ("HF_HOME=/data/hub", "HF_TOKEN=hf_abc", "ENV HF_TOKEN would be kept"),
    ],
)
def test_a_fault_in_the_dockerfile_is_found(before: str, after: str, words: str) -> None:
    assert before in DOCKERFILE
    found = list(dockerfile_problems(DOCKERFILE.replace(before, after), IGNORED, ROOT))
    assert any(words in problem for problem in found), found


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('["2", "3"]', '["1", "2"]', "GPU 1 is given twice"),
        ('["2", "3"]', '["2"]', "gpu-1: 2 ranks for 1 GPUs"),
        ('"3001:3000"', '"3000:3000"', "port 3000 is given twice"),
        ('"3001:3000"', '"3001:80"', "port 80 is not the image's"),
        ("target: cuda", "target: gpu", "the Dockerfile has no target gpu"),
        ("--num-shard", "--num-shards", "No such option"),
        ("  shm_size: 2gb\n", "", "ranks need shared memory"),
        ("stop_grace_period: 120s", "stop_grace_period: 10s", "killed before its grace period"),
        ("${HF_TOKEN:-}", "hf_abc", "HF_TOKEN stands in the file"),
        ("cache-gpu-1:/data", "cache-gpu-0:/data", "cache-gpu-0 has two owners"),
        ("cache-gpu-1:/data", "cache:/data", "there is no volume cache"),
        ("./examples/adapters", "./examples/loras", "./examples/loras does not exist"),
    ],
)
def test_a_fault_in_the_compose_file_is_found(before: str, after: str, words: str) -> None:
    assert before in COMPOSE
    text = COMPOSE.replace(before, after)
    found = list(compose_problems(text, set(stages(DOCKERFILE)), ROOT))
    assert any(words in problem for problem in found), found
