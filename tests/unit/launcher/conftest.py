"""The command line without a launch behind it, and a supervisor over fake children."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.launcher_stage import Stage, is_alive

from lorax_launcher import cli
from lorax_launcher.console import Console
from lorax_launcher.options import LauncherOptions

# Variables that are read beside those of the options.
AMBIENT = ("HOSTNAME", "LOG_LEVEL", "LOG_FORMAT")


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> list[LauncherOptions]:
    """Record what would be launched, and forget this machine's variables."""
    launched: list[LauncherOptions] = []

    def launch(options: LauncherOptions, console: Console, times: object) -> int:
        launched.append(options)
        return 0

    monkeypatch.setattr(cli, "launch", launch)
    for option in cli.main.params:
        if isinstance(option.envvar, str):
            monkeypatch.delenv(option.envvar, raising=False)
    for name in AMBIENT:
        monkeypatch.delenv(name, raising=False)
    return launched


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setenv("FAKE_DIR", str(tmp_path))
    stage = Stage(tmp_path)
    stage.plan_behaviour()
    yield stage
    for pid in stage.pids():
        assert not is_alive(pid), "a child outlived its launcher"
