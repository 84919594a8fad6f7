"""What kernels in C++ promise, as far as their sources show it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lorax_shard

SOURCES = sorted(
    path for path in Path(lorax_shard.__file__).parent.rglob("*.cpp")
    if "_team(" in path.read_text(encoding="utf-8")
)  # fmt: skip
_FUNCTION = re.compile(r"^\S.*\b(\w+)\(.*\) (?:const )?\{", re.MULTILINE)
_FIELD = re.compile(r"(?:\.|->)num_threads\b")


def readers(source: str) -> set[str]:
    """Return the functions in which the threads that a call asks for are read."""
    functions = [(each.start(), each[1]) for each in _FUNCTION.finditer(source)]
    return {
        max((start, name) for start, name in functions if start < field.start())[1]
        for field in _FIELD.finditer(source)
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_teams_share_work_by_how_many_they_are(path: Path) -> None:
    """Fields of a program's calls are those of a recording, which is made on one thread."""
    source = path.read_text(encoding="utf-8")
    alone = {name.removesuffix("_team") for name in re.findall(r"\b(lorax_\w+_team)\(", source)}
    others = readers(source) - alone
    # Packing is asked for by Python alone.
    assert all(name.endswith("_pack") for name in others), others


def test_readers_are_found() -> None:
    found = set[str]().union(*(readers(path.read_text(encoding="utf-8")) for path in SOURCES))
    assert {"lorax_quantized_linear", "lorax_panel_linear", "lorax_lora_apply"} <= found


def test_a_reader_that_teams_call_is_found() -> None:
    source = """
bool shares(const Call& call) {
    return call.num_threads > 1;
}
extern "C" void lorax_it_team(const Call* call) {
    shares(*call);
}
"""
    assert readers(source) == {"shares"}
