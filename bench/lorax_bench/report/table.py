"""Results on a terminal."""

from __future__ import annotations

from rich.console import Console, JustifyMethod
from rich.table import Table

from lorax_bench.document import MeasuredRun, Results
from lorax_bench.report.lines import columns, groups, number

# Adapters of a table by adapter; those after it are in the file.
_MOST_ADAPTERS = 40


def show(found: Results, console: Console, *, by_adapter: bool = False) -> None:
    """Print a table of the runs, their ratios, and what failed."""
    lines = groups(found.runs)
    table = Table(title=found.title, caption="times: p50 / p90 / p99; medians over rounds")
    parts = columns(lines)
    for part in parts:
        side: JustifyMethod = "left" if part.title == "system" else "right"
        table.add_column(part.title, justify=side, overflow="fold")
    for line in lines:
        table.add_row(*(part.text(line) for part in parts))
    console.print(table)
    for each in found.ratios:
        console.print(
            f"{each.name}: [bold]{each.value:.2f}[/] (rounds {each.low:.2f} to {each.high:.2f})",
            highlight=False,
        )
    for line in lines:
        for words, times in line.errors.items():
            console.print(f"{line.label}: {times} x {words}", style="red", markup=False)
    if by_adapter:
        for run in found.runs:
            if run.adapters:
                console.print(_adapters(run))


def _adapters(run: MeasuredRun) -> Table:
    table = Table(title=f"{run.label}, round {run.round}, by adapter")
    for title in (
        "adapter", "requests", "failed", "output tok/s", "TTFT p50, s", "TTFT p99, s",
        "inter-token p50, ms",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for name, line in list(run.adapters.items())[:_MOST_ADAPTERS]:
        gap = line["inter_token_p50_s"]
        table.add_row(
            name, *(f"{line[each] or 0:.0f}" for each in ("requests", "failed")),
            *(
                "-" if line[each] is None else number(line[each] or 0.0)
                for each in ("output_tokens_per_s", "ttft_p50_s", "ttft_p99_s")
            ),
            "-" if gap is None else number(gap * 1e3),
        )  # fmt: skip
    return table
