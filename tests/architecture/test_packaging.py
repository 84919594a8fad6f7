"""What is installed is complete: every package is found, every file beside its code is shipped."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FIND = SETUPTOOLS["packages"]["find"]


def installed_files() -> list[Path]:
    found = [path for house in FIND["where"] for path in (ROOT / house).glob("lorax_*/**/*")]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def test_every_file_of_a_package_is_shipped() -> None:
    patterns = [*SETUPTOOLS["package-data"]["*"], "*.py"]
    files = installed_files()
    names = {path.name for path in files}
    assert {"attend.cpp", "generate.proto", "index.html", "py.typed"} <= names
    # Patterns are those of packages: a folder without code would be left out.
    assert [path for path in files if not (path.parent / "__init__.py").is_file()] == []
    unmatched = [
        path.relative_to(ROOT)
        for path in files
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
    ]
    assert unmatched == []


def test_every_folder_with_code_is_found() -> None:
    folders = {path.parent for path in installed_files() if path.suffix == ".py"}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    outermost = {path.name for house in FIND["where"] for path in (ROOT / house).glob("lorax_*/")}
    assert all(any(fnmatch.fnmatch(name, each) for each in FIND["include"]) for name in outermost)


@pytest.mark.parametrize(
    "package",
    [folder for house in FIND["where"] for folder in (ROOT / house).glob("lorax_*/")],
    ids=lambda p: p.name,
)
def test_every_package_is_marked_as_typed(package: Path) -> None:
    assert (package / "py.typed").is_file()


def test_every_dependency_has_a_release_that_the_tests_passed_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {canonicalize_name(Requirement(each).name) for each in needed} - {"torch", "triton"}
    pins = [Requirement(each) for each in (ROOT / "constraints.txt").read_text().split()]
    assert all(each.operator == "==" for pin in pins for each in pin.specifier)
    assert names <= {canonicalize_name(pin.name) for pin in pins}
    for each in map(Requirement, needed):
        for pin in pins:
            if canonicalize_name(pin.name) == canonicalize_name(each.name):
                (version,) = pin.specifier
                assert each.specifier.contains(version.version)
