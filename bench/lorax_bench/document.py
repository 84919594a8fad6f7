"""Results as one JSON document: what ran where, and what it came to.

Everything that is shown (tables, plots, the page) is made from this alone, so that a file kept
from long ago can be shown again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorax_bench import machine
from lorax_bench.measures import PERCENTILES, Figures, Spread, by_adapter, figures, ratio
from lorax_bench.records import Record
from lorax_bench.requests import Workload

FORMAT = 1
# More digits than any run has again.
_DIGITS = 6
_NUMBERS = re.compile(r"\[\s+([-+\d.eE,\s]+?)\s+\]")


class DocumentError(Exception):
    """A file holds no results that this version can read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """One workload, sent once to one system."""

    system: str
    """Who answered, such as ``lorax-py``."""
    variant: str
    """What differs from the system's other runs, such as ``8 adapters``; may be empty."""
    workload: str
    round: int
    concurrency: int | None
    rate: float | None
    """Requests per second that were sent; None: not by a rate."""
    num_adapters: int
    figures: Figures
    adapters: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Of each adapter, by its number or ``base``: `brief` of its figures."""
    peak_memory_bytes: int | None = None

    @property
    def label(self) -> str:
        """What rows and curves are called."""
        return f"{self.system}, {self.variant}" if self.variant else self.system


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRatio:
    """How one kind of runs compares with another, over all rounds."""

    name: str
    value: float
    low: float
    high: float
    """The bounds of what single rounds gave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that one command measured."""

    title: str
    runs: Sequence[MeasuredRun]
    ratios: Sequence[NamedRatio] = ()
    date: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    commit: str | None
    command: Sequence[str] = ()


def measured(
    system: str, workload: Workload, records: Sequence[Record], *, variant: str = "",
    round: int = 0, rate: float | None = None, peak_memory_bytes: int | None = None,
) -> MeasuredRun:  # fmt: skip
    """Return the run that these records are of."""
    parts = by_adapter(records) if workload.num_adapters else {}
    return MeasuredRun(
        system=system, variant=variant, workload=workload.name, round=round,
        concurrency=workload.concurrency, rate=rate, num_adapters=workload.num_adapters,
        figures=figures(records),
        adapters={
            "base" if adapter is None else str(adapter): brief(part)
            for adapter, part in parts.items()
        },
        peak_memory_bytes=peak_memory_bytes,
    )  # fmt: skip


def brief(found: Figures) -> dict[str, float | None]:
    """Return the figures that a line of a table has; times in seconds."""
    line: dict[str, float | None] = {
        "requests": found.num_requests,
        "failed": found.num_failed,
        "output_tokens": found.num_output_tokens,
        "output_tokens_per_s": found.output_tokens_per_s,
        "requests_per_s": found.requests_per_s,
    }
    spreads = {
        "ttft": found.ttft, "inter_token": found.inter_token, "end_to_end": found.end_to_end,
    }  # fmt: skip
    for name, spread in spreads.items():
        for percent in PERCENTILES:
            line[f"{name}_p{percent}_s"] = None if spread is None else spread.at(percent)
    return line


def compared(name: str, ours: Sequence[MeasuredRun], others: Sequence[MeasuredRun]) -> NamedRatio:
    """Return the ratio of output tokens per second; runs of one round were next to each other."""
    found = ratio(*([run.figures.output_tokens_per_s for run in runs] for runs in (ours, others)))
    low, high = found.bounds
    return NamedRatio(name=name, value=found.of_medians, low=low, high=high)


def results(
    title: str, runs: Sequence[MeasuredRun], *, ratios: Sequence[NamedRatio] = (),
    command: Sequence[str] = (),
) -> Results:  # fmt: skip
    """Return runs together with machine, versions, commit and date."""
    return Results(
        title=title, runs=runs, ratios=ratios, command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"), machine=machine.machine(),
        versions=machine.versions(), commit=machine.commit(),
    )  # fmt: skip


def save(found: Results, path: Path) -> None:
    """Write results to a file."""
    document = {"format": FORMAT, **_rounded(asdict(found))}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1)
    # A curve is one line.
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    path.write_text(text + "\n")


def load(path: Path) -> Results:
    """Read results from a file; raises DocumentError."""
    try:
        document = json.loads(path.read_text())
        if document.pop("format") != FORMAT:
            raise DocumentError(f"{path} was written by another version of lorax-bench")
        runs = [_run(each) for each in document.pop("runs")]
        ratios = [NamedRatio(**each) for each in document.pop("ratios")]
        return Results(runs=runs, ratios=ratios, **document)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DocumentError(f"{path} holds no results of lorax-bench: {error}") from None


def _run(document: dict[str, Any]) -> MeasuredRun:
    found = document.pop("figures")
    for name in ("ttft", "inter_token", "end_to_end"):
        if (spread := found[name]) is not None:
            found[name] = Spread(**{**spread, "curve_s": tuple(spread["curve_s"])})
    return MeasuredRun(figures=Figures(**found), **document)


def _rounded(value: Any) -> Any:
    """Return a document whose numbers have as many digits as mean something."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
