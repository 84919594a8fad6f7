"""The import rules of the rooms, and that they notice a planted fault."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSES = ("proto", "router", "shard", "launcher", "bench")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the source below ``root``."""
    program = Path(sys.executable).parent / "lint-imports"
    path = os.pathsep.join(str(root / house) for house in HOUSES)
    return subprocess.run(
        [str(program), "--no-logo", "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_rooms_import_only_what_they_may() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the source, to plant faults in."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for house in HOUSES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / house, tmp_path / house, ignore=ignored)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("router/lorax_router/core/ports.py", "import time"),
        ("router/lorax_router/core/ports.py", "from asyncio import sleep"),
        ("router/lorax_router/core/ports.py", "import lorax_contract.logs"),
        ("router/lorax_router/core/ports.py", "import lorax_router.simulator.cost"),
        ("router/lorax_router/simulator/driver.py", "import time"),
        ("router/lorax_router/service/engine/port.py", "import grpc"),
        ("router/lorax_router/service/engine/port.py", "import lorax_shard"),
        ("shard/lorax_shard/model/interface.py", "import lorax_router"),
        ("shard/lorax_shard/lora/patches.py", "import transformers"),
        ("shard/lorax_shard/engine/engine.py", "import transformers"),
        ("shard/lorax_shard/peft/config.py", "import peft"),
        ("shard/lorax_shard/engine/engine.py", "from lorax_proto import generate_pb2"),
        ("launcher/lorax_launcher/options.py", "import torch"),
        ("proto/lorax_contract/step.py", "import numpy"),
        ("bench/lorax_bench/requests.py", "import lorax_shard"),
        ("launcher/lorax_launcher/options.py", "import lorax_bench"),
    ],
)
def test_a_planted_import_is_noticed(copy: Path, file: str, statement: str) -> None:
    path = copy / file
    path.write_text(f"{path.read_text()}\n{statement}\n")
    done = lint_imports(copy)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout


# The core may use these and lorax_contract, nothing else.
CORE_MAY_IMPORT = {
    "__future__", "abc", "array", "bisect", "collections", "contextlib", "copy", "dataclasses",
    "enum", "functools", "hashlib", "heapq", "itertools", "lorax_contract", "lorax_router.core",
    "math", "operator", "types", "typing",
}  # fmt: skip


def test_the_core_imports_from_a_short_list() -> None:
    strangers = {
        f"{path.name}: {module}"
        for path in (ROOT / "router/lorax_router/core").rglob("*.py")
        for module in imported_modules(path)
        if not any(module == may or module.startswith(f"{may}.") for may in CORE_MAY_IMPORT)
    }
    assert not strangers


def imported_modules(path: Path) -> set[str]:
    """Return the modules that a file names in its imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize(
    "module",
    [
        "lorax_bench.cli",
        "lorax_launcher.cli",
        "lorax_router.cli",
        "lorax_router.simulator.cli",
        "lorax_shard.cli",
    ],
)
def test_a_command_line_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'peft', 'grpc'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{module} loads {done.stderr}"
