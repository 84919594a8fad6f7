"""A program of this project, run by an actor: its records, its end, and that it ends with the actor."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorax_launcher.children import Child
from lorax_launcher.console import parse_record
from lorax_launcher.placing.tied import tied

# Lines that are kept of what went wrong.
_KEPT = 3


class ChildProgram:
    """A running program that writes JSON records; the kernel ends it with this process.

    Args:
        module: what Python runs.
        options: of its command line.
        on_record: hears each record.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        module: str,
        options: Sequence[str],
        on_record: Callable[[Mapping[str, Any]], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        self._options = [*options]
        self._on_record = on_record
        self._environment = {**os.environ, **(environment or {})}
        self._child: Child | None = None
        self._wrong: deque[str] = deque(maxlen=_KEPT)
        self._is_ending = False

    @property
    def wrong(self) -> str:
        """The last lines about what went wrong, or that are no records."""
        return "\n".join(self._wrong)

    async def run(self) -> int:
        """Run it to its end; return its exit code, negative for a signal."""
        words = [sys.executable, "-m", self._module, *self._options]
        self._child = child = await Child.start(
            self._module, lambda _: tied(words), on_line=self._take, environment=self._environment
        )
        if self._is_ending:
            child.terminate()
        try:
            code = await asyncio.shield(child.exited)
        finally:
            child.kill()
            await child.close()
        return code

    def end(self) -> None:
        """Ask it to finish what it has and end; more than once asks again."""
        self._is_ending = True
        if self._child is not None:
            self._child.terminate()

    def _take(self, _name: str, line: str) -> None:
        # Ray keeps what its workers write.
        print(line, flush=True)  # noqa: T201
        record = parse_record(line)
        if record is None or record.get("level") in ("error", "critical"):
            self._wrong.append(line if record is None else record["message"])
        if record is not None:
            self._on_record(record)
