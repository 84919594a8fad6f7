"""A supervisor over fake children that do what a scenario says."""

from __future__ import annotations

import asyncio
import io
import json
import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.fake_launcher import FACTS, fake_programs

from lorax_launcher.console import Console
from lorax_launcher.options import LauncherOptions
from lorax_launcher.resolve import resolve
from lorax_launcher.run_dir import run_directory
from lorax_launcher.supervisor import Supervisor

WAIT_S = 30.0


@dataclass
class Stage:
    """A folder where fake children find their scenario and leave their traces."""

    folder: Path
    output: io.StringIO = field(default_factory=io.StringIO)

    def plan_behaviour(self, **roles: dict[str, Any]) -> None:
        (self.folder / "scenario.json").write_text(json.dumps(roles))

    def pid(self, role: str) -> int:
        return int((self.folder / f"{role}.pid").read_text())

    def started(self, role: str) -> bool:
        return (self.folder / f"{role}.pid").exists()

    def seen(self, role: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{role}.json").read_text())

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob("*.pid")]

    def run(
        self,
        *,
        when_ready: Callable[[Supervisor], None] | None = None,
        on_line: tuple[str, Callable[[Supervisor], None]] | None = None,
        on_again: Callable[[Supervisor], None] | None = None,
        again: str = "ready again",
        **options: Any,
    ) -> int:
        """Run a supervisor to its end; act when it is ready, or when a line appears.

        ``on_again`` acts whenever its shards are ready another time, or another line appears.
        """
        marker, action = on_line or ("Ready:", when_ready)

        class Watching(io.StringIO):
            def write(stream, text: str) -> int:  # noqa: N805
                self.output.write(text)
                for words, act in ((marker, action), (again, on_again)):
                    if act is not None and words in text:
                        asyncio.get_running_loop().call_soon(act, supervisor)
                return len(text)

        async def main(run_dir: Path) -> int:
            nonlocal supervisor
            selections = LauncherOptions(**{"restarts": 0, **options})
            plan = resolve(selections, FACTS, str(run_dir))
            console = Console(Watching(), json_output=selections.json_output)
            supervisor = Supervisor(
                plan, fake_programs(), console, run_dir, download_only=selections.download_only
            )
            return await asyncio.wait_for(supervisor.run(), WAIT_S)

        supervisor: Supervisor
        with run_directory() as run_dir:
            return asyncio.run(main(run_dir))

    @property
    def last_line(self) -> str:
        return self.output.getvalue().splitlines()[-1]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for_end(pid: int) -> None:
    """Wait until a process, which need not be a child of ours, has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([descriptor], [], [], WAIT_S)
        assert ready, f"process {pid} still runs"
    finally:
        os.close(descriptor)


def stop(supervisor: Supervisor) -> None:
    supervisor.request_stop()


def kill_children_of(stage: Stage, role: str) -> Callable[[Supervisor], None]:
    return lambda _: os.kill(stage.pid(role), signal.SIGKILL)
