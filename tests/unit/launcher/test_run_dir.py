"""The private folder of a run comes, and goes even after a kill."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lorax_launcher.options import UsageError
from lorax_launcher.run_dir import run_directory, sweep


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files with a path of any length."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("lorax_launcher.run_dir._LONGEST_PARENT", 4096)
    return tmp_path


def test_it_is_private_and_removed(temporary: Path) -> None:
    with run_directory() as folder:
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "socket").touch()
    assert list(temporary.iterdir()) == []


def test_it_is_removed_after_an_error(temporary: Path) -> None:
    with pytest.raises(KeyError), run_directory():
        raise KeyError
    assert list(temporary.iterdir()) == []


def test_a_long_tmpdir_does_not_make_sockets_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    with run_directory() as folder:
        assert len(str(folder)) < 60


def test_what_a_killed_launcher_left_is_swept_and_a_living_ones_is_not(temporary: Path) -> None:
    code = (
        "import os, tempfile, lorax_launcher.run_dir as r\n"
        f"tempfile.tempdir = {str(temporary)!r}; r._LONGEST_PARENT = 4096\n"
        "with r.run_directory():\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60)
    (left,) = temporary.iterdir()
    with run_directory() as living:
        assert not left.exists()
        sweep(temporary)
        assert living.exists()


def test_folders_of_others_stay(temporary: Path) -> None:
    (temporary / "lorax-notes").mkdir()
    sweep(temporary)
    assert (temporary / "lorax-notes").exists()


@pytest.mark.parametrize("function", ["gettempdir", "mkdtemp"])
def test_where_nothing_can_be_written_it_is_said_in_one_sentence(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, function, refuse)
    with pytest.raises(UsageError, match="Read-only file system; set TMPDIR"), run_directory():
        pass
