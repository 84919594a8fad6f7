"""The lines that tables, plots and pages share: runs of one kind together, medians over rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorax_bench.document import MeasuredRun, brief


@dataclass(frozen=True, slots=True, kw_only=True)
class RunGroup:
    """All rounds of one kind of run."""

    label: str
    runs: Sequence[MeasuredRun]

    @property
    def load(self) -> float | None:
        """What a sweep goes along: the rate, else the concurrency."""
        first = self.runs[0]
        return first.rate if first.rate is not None else first.concurrency

    def values(self, name: str) -> list[float]:
        """Return one of `brief`'s figures of each round that has it."""
        found = (brief(run.figures)[name] for run in self.runs)
        return [value for value in found if value is not None]

    def median(self, name: str) -> float | None:
        """Return the median over rounds; None where no round has it."""
        values = self.values(name)
        return statistics.median(values) if values else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most memory of any round."""
        known = [run.peak_memory_bytes for run in self.runs if run.peak_memory_bytes is not None]
        return max(known) if known else None

    @property
    def errors(self) -> dict[str, int]:
        """What failed in all rounds together, in words."""
        total: dict[str, int] = {}
        for run in self.runs:
            for words, number in run.figures.errors.items():
                total[words] = total.get(words, 0) + number
        return total


def groups(runs: Sequence[MeasuredRun]) -> list[RunGroup]:
    """Return runs by workload, label and load, in the order in which they first ran."""
    found: dict[tuple[object, ...], list[MeasuredRun]] = {}
    for run in runs:
        found.setdefault((run.workload, run.label, run.concurrency, run.rate), []).append(run)
    alone = len({run.system for run in runs}) == 1
    many = len({run.workload for run in runs}) > 1
    return [
        RunGroup(label=_label(each[0], alone=alone, many=many), runs=each)
        for each in found.values()
    ]


def _label(run: MeasuredRun, *, alone: bool, many: bool) -> str:
    """Name a run by what tells it from the others."""
    name = run.variant if alone and run.variant else run.label
    return f"{run.workload}: {name}" if many else name


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    title: str
    text: Callable[[RunGroup], str]


def _with_rounds(name: str) -> Callable[[RunGroup], str]:
    """Median, and the bounds over rounds where there are several."""

    def text(group: RunGroup) -> str:
        values = group.values(name)
        if len(values) < 2:
            return number(values[0]) if values else "-"
        bounds = f"{number(min(values))}-{number(max(values))}"
        return f"{number(statistics.median(values))} ({bounds})"

    return text


def _times(name: str, scale: float) -> Callable[[RunGroup], str]:
    """p50 / p90 / p99, each the median over rounds."""

    def text(group: RunGroup) -> str:
        values = [group.median(f"{name}_p{percent}_s") for percent in (50, 90, 99)]
        return " / ".join("-" if each is None else number(each * scale) for each in values)

    return text


def _rate(group: RunGroup) -> str:
    rate = group.runs[0].rate
    return "-" if rate is None else number(rate)


def number(value: float) -> str:
    """Return three digits that mean something, and no exponent."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def columns(runs: Sequence[RunGroup]) -> list[Column]:
    """Return the columns that these runs fill."""
    found = [Column("system", lambda group: group.label)]
    if any(run.load is not None for run in runs):
        found.append(Column("at once", lambda group: str(group.runs[0].concurrency or "-")))
    if any(run.runs[0].rate is not None for run in runs):
        found.append(Column("sent/s", _rate))
    found += [
        Column("output tok/s", _with_rounds("output_tokens_per_s")),
        Column("req/s", _with_rounds("requests_per_s")),
        Column("TTFT, s", _times("ttft", 1.0)),
        Column("inter-token, ms", _times("inter_token", 1e3)),
        Column("end-to-end, s", _times("end_to_end", 1.0)),
    ]
    if any(run.peak_memory_bytes for run in runs):
        found.append(
            Column("peak GiB", lambda group: number((group.peak_memory_bytes or 0) / 2**30))
        )
    found.append(Column("failed", lambda group: str(int(sum(group.values("failed"))))))
    return found
