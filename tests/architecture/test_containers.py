"""Dockerfile and compose.yaml agree with the launcher and the checkout; planted faults are found."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from tests.helpers.container_lint import compose_problems, dockerfile_problems, inherited, stages

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text()
COMPOSE = (ROOT / "compose.yaml").read_text()


def test_the_dockerfile_is_right() -> None:
    assert list(dockerfile_problems(DOCKERFILE, IGNORED, ROOT)) == []


def test_the_compose_file_is_right() -> None:
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
        ("3.12.11-slim-bookworm", "latest", "python:latest is not pinned"),
        ("torch==2.13.0", "torch", "torch is not pinned"),
        ("USER 10001\n", "", "cpu runs as root"),
        ("EXPOSE 3000", "EXPOSE 8080", "cpu exposes 8080"),
        (":3000/health", ":3000/ready", "asks no /health"),
        ("AS cuda\n", "AS gpu\n", "there is no target cuda"),
        ("COPY router router", "COPY routers router", "COPY routers, which does not exist"),
        ("COPY router router", "COPY tests tests", "COPY tests, which .dockerignore leaves out"),
        ("--from=build-cpu", "--from=builder", "COPY from builder, which is no stage"),
        ('"--json-output"', '"--json-logs"', "--json-logs"),
        ('"--port", "3000"', '"--port", "80"', "it listens on 80"),
        ('"/adapters"]\nUSER', '"/lora"]\nUSER', "/adapters is no volume"),
        ("HF_HOME=/data/hub", "HF_HOME=/hub", "keeps HF_HOME in no volume"),
        ("HF_HOME=/data/hub", "HF_TOKEN=hf_abc", "ENV HF_TOKEN would be kept"),
        (" \\\n    && rm -rf /var/lib/apt/lists/*", "", "package lists stay"),
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
