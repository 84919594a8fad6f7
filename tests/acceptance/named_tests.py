"""Tests as pages and lists name them: ``tests/some/test_file.py``, at most with ``::test_name``."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NAME = re.compile(r"`(tests/[\w/]+\.py(?:::\w+)?)`")


def tests_in(text: str) -> list[str]:
    """Return the tests that a text names, each once, in its order."""
    return list(dict.fromkeys(_NAME.findall(text)))


def named_in(page: str) -> list[str]:
    """Return the tests that a page of ``docs`` names, each once, in its order."""
    return tests_in((ROOT / "docs" / page).read_text())


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """Return the tests that the rows of a table name, by their first cells.

    The first two lines are no rows. Raises ValueError where there is no such heading in the page of
    ``docs``, or no row below it.
    """
    section = re.split(
        rf"^## {re.escape(heading)}\n", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE
    )
    if len(section) != 2:
        raise ValueError(f"{page} has no heading {heading!r}")
    lines = re.split(r"^## ", section[1], flags=re.MULTILINE)[0].splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    if not rows:
        raise ValueError(f"{page} has no table below {heading!r}")
    return {row.split("|")[1].strip(): tests_in(row) for row in rows}


def is_there(name: str) -> bool:
    """Whether a file is there, and the function in it if one is named."""
    path, _, function = name.partition("::")
    if not (ROOT / path).is_file():
        return False
    return not function or function.rpartition("::")[2].partition("[")[0] in _functions(path)


@cache
def _functions(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))
