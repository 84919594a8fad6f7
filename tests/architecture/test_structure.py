"""The shape of the house: no circles, no prefix that wants to be a folder, one name for one class."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent for path in ROOT.glob("*/lorax_*/__init__.py"))
# Bodies and answers of a dialect are named as that dialect's own documents name them.
DIALECTS = ROOT / "router/lorax_router/http_api"

Graph = Mapping[str, set[str]]


def _sources(package: Path) -> Iterator[Path]:
    """Yield the files of a package that people wrote."""
    return (path for path in sorted(package.rglob("*.py")) if "_pb2" not in path.name)


def _all_sources(*folders: str) -> list[Path]:
    """Return the files of all packages and of these folders, each once."""
    places = [*PACKAGES, *(ROOT / folder for folder in folders)]
    return sorted({path for place in places for path in _sources(place)})


def _module(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imports(tree: ast.AST, known: Iterable[str]) -> set[str]:
    """Return which of the known modules a file imports, at its top or within a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & set(known)


def _graph(package: Path) -> Graph:
    """Return what each module of a package imports of it."""
    paths = {_module(path, package): path for path in package.rglob("*.py")}
    # A folder's own name says nothing: its modules are what is imported.
    paths = {name: path for name, path in paths.items() if path.name != "__init__.py"}
    return {
        name: _imports(ast.parse(path.read_text()), paths) - {name} for name, path in paths.items()
    }


def _folders(graph: Graph) -> Graph:
    """Return the same by the folders directly within the package."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, imported in graph.items():
        own = ".".join(name.split(".")[:2])
        found[own] |= {".".join(each.split(".")[:2]) for each in imported} - {own}
    return found


def _circle(graph: Graph) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_nothing_imports_in_a_circle(package: Path) -> None:
    graph = _graph(package)
    assert _circle(graph) == []
    assert _circle(_folders(graph)) == []


def test_a_circle_is_found() -> None:
    modules = {"a.x.one": {"a.y.two"}, "a.y.two": set(), "a.y.three": {"a.x.one"}}
    assert _circle(modules) == []
    assert set(_circle(_folders(modules))) == {"a.x", "a.y"}


def test_no_three_files_of_a_folder_share_a_prefix() -> None:
    """``adapter_x``, ``adapter_y`` and ``adapter_z`` want to be a folder of that name."""
    counts = Counter(
        (str(path.parent.relative_to(ROOT)), path.stem.partition("_")[0])
        for path in _all_sources("bench", "examples")
    )
    assert [place for place, number in counts.items() if number > 2] == []


def test_no_class_name_has_two_meanings() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in _all_sources("bench"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and DIALECTS not in path.parents:
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
