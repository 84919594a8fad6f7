"""Limits on files and functions, and what must not be in the source."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LIMIT = 500
FUNCTION_LIMIT = 80
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def tracked_files() -> list[Path]:
    """Return the files of the checkout, those not yet committed included."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = (ROOT / name for name in listing.split("\0") if name)
    return [path for path in paths if path.is_file()]


def python_files() -> list[Path]:
    """Return our own Python files; an unpacked archive has no index, so the tree is walked."""
    if (ROOT / ".git").exists():
        found = [path for path in tracked_files() if path.suffix == ".py"]
    else:
        houses = ("proto", "router", "shard", "launcher", "tests", "bench", "examples")
        found = [path for house in houses for path in (ROOT / house).rglob("*.py")]
    return [path for path in found if not path.name.endswith(GENERATED)]


FILES = python_files()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_there_is_source_to_look_at() -> None:
    names = {name_of(path) for path in FILES}
    assert {"proto/lorax_contract/step.py", "launcher/lorax_launcher/cli.py"} <= names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LIMIT
    for node in functions(path):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        assert length <= FUNCTION_LIMIT, f"{node.name} has {length} lines"


# Spelt in parts, so that this file does not find itself.
FORBIDDEN = [
    "TO" + "DO", "FIX" + "ME", "X" * 3 + ":", "raise NotImplemented" + "Error", "import pi" + "ckle",
]  # fmt: skip


@pytest.mark.parametrize("word", FORBIDDEN)
def test_nothing_is_left_undone_or_unsafe(word: str) -> None:
    pattern = re.compile(rf"\b{re.escape(word)}")
    assert [name_of(path) for path in FILES if pattern.search(path.read_text())] == []


def source_files() -> list[Path]:
    return [
        path
        for path in FILES
        if name_of(path).startswith(("proto/lorax_", "router", "shard", "launcher", "bench/lorax_"))
    ]


@pytest.mark.parametrize("path", source_files(), ids=name_of)
def test_public_names_are_described(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
