"""A reader of pages notices what goes wrong, and keeps what a page has set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tests.acceptance.look.reader import Fault, Reader, Started
from tests.helpers.documented_blocks import ROOT, Block

PAGE = ROOT / "docs" / "page.md"


def no_server() -> Started:
    raise AssertionError("no server is wanted")


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (tmp_path / ".venv" / "lib" / version / "site-packages").mkdir(parents=True)
    return Reader(tmp_path, {"PATH": os.environ["PATH"]}, no_server)


def read(reader: Reader, code: str, language: str = "sh") -> None:
    reader.read(Block(PAGE, 1, language, code, None))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("false", "exit 1"),
        ("false | cat", "exit 1"),
        ("""echo '{"error": "no such adapter"}'""", "no such adapter"),
        ("curl() { true; }; curl", "says nothing"),
        ("echo $never_set", "unbound variable"),
    ],
)
def test_what_goes_wrong_is_noticed(reader: Reader, code: str, words: str) -> None:
    with pytest.raises(Fault, match=words):
        read(reader, code)


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import no_such_package", "print('')"])
def test_what_goes_wrong_in_python_is_noticed(reader: Reader, code: str) -> None:
    with pytest.raises(Fault):
        read(reader, code, "python")


def test_what_a_block_sets_and_writes_is_there_for_the_next_one(reader: Reader) -> None:
    read(reader, "export KEY=$(echo a b)\necho text > file")
    read(reader, 'test "$KEY" = "a b"\ngrep text file')
    read(reader, "import os\nprint(os.environ['KEY'])", "python")
