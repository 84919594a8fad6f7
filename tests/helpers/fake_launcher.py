"""A launcher over fake children, as a program that a test may kill."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from lorax_launcher.console import Console
from lorax_launcher.facts import DeviceFacts
from lorax_launcher.options import LauncherOptions
from lorax_launcher.resolve import resolve
from lorax_launcher.run_dir import run_directory
from lorax_launcher.supervisor import Programs, Supervisor

FACTS = DeviceFacts(num_cores=2, memory_bytes=2**33)


def fake_programs() -> Programs:
    program = (sys.executable, str(Path(__file__).with_name("fake_child.py")))
    return Programs(shard=program, router=program)


async def supervise(run_dir: Path) -> int:
    plan = resolve(LauncherOptions(grace_period_s=60.0), FACTS, str(run_dir))
    return await Supervisor(plan, fake_programs(), Console(), run_dir).run()


def main() -> int:
    with run_directory() as run_dir:
        (Path(os.environ["FAKE_DIR"]) / "run_dir").write_text(str(run_dir))
        return asyncio.run(supervise(run_dir))


if __name__ == "__main__":
    sys.exit(main())
