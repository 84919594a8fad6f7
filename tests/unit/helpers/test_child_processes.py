"""The tests' own view of processes: they come and go while somebody looks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import psutil
from tests.helpers.child_processes import running_children

MARK = "of_a_test_of_processes"


def child() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "input()", MARK]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def test_a_child_that_ends_between_the_list_and_the_look_is_none(monkeypatch: Any) -> None:
    with child() as gone, child() as stays:
        listed = psutil.Process.children

        def list_then_end(*args: Any, **options: Any) -> list[psutil.Process]:
            found = listed(*args, **options)
            gone.kill()
            gone.wait()
            return found

        monkeypatch.setattr(psutil.Process, "children", list_then_end)
        assert [each.pid for each in running_children(MARK)] == [stays.pid]
        stays.kill()


def test_a_child_that_nobody_has_waited_for_does_not_run() -> None:
    with child() as ended:
        assert [each.pid for each in running_children(MARK)] == [ended.pid]
        ended.kill()
        while running_children(MARK):
            pass
        assert ended.returncode is None
