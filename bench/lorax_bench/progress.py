"""How a run goes, on the terminal that waits for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lorax_bench.records import Record
from lorax_bench.requests import Workload


@contextlib.contextmanager
def watched(title: str, workload: Workload) -> Iterator[Callable[[Record], None]]:
    """Draw a bar of the requests that ended, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    # Drawn twice a second: it shares the machine with what is measured.
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, refresh_per_second=2
    ) as progress:
        task = progress.add_task(title, total=len(workload.requests))
        yield lambda record: progress.advance(task)
