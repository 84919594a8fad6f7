"""Plots of results: rates side by side, distributions of times, and the curves of a sweep."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorax_bench.document import Results
from lorax_bench.measures import Spread
from lorax_bench.report.lines import RunGroup, groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
# Systems whose bars an eye can tell apart.
_MOST_BARS = 24


class NoPlotsError(Exception):
    """matplotlib is not installed."""


def png(found: Results) -> bytes:
    """Return the plots of results as a PNG; raises NoPlotsError."""
    buffer = io.BytesIO()
    _figure(found).savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def save_png(found: Results, path: Path) -> None:
    """Write the plots of results as a PNG; raises NoPlotsError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(found))


def _figure(found: Results) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NoPlotsError(
            "plots need matplotlib: install lorax-py[bench], or leave --png and --html out"
        ) from None
    lines = groups(found.runs)
    is_sweep = len({line.load for line in lines}) > 2
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    if is_sweep:
        _sweep(first, lines, {"output tokens/s": "output_tokens_per_s"}, "output tokens per second")
        _sweep(
            second,
            lines,
            {"p50": "ttft_p50_s", "p99": "ttft_p99_s"},
            "time to first token (TTFT), s",
        )
        _sweep(
            third, lines, {"p50": "inter_token_p50_s", "p99": "inter_token_p99_s"},
            "inter-token time, s",
        )  # fmt: skip
    else:
        _bars(first, lines)
        _shares(second, lines, "ttft", "time to first token (TTFT), s")
        _shares(third, lines, "inter_token", "inter-token time, s")
    figure.suptitle(f"{found.title} ({found.date[:10]}, {found.machine.get('cpu', '')})")
    return figure


def _bars(axes: Axes, lines: Sequence[RunGroup]) -> None:
    """Draw the median rate of each, its rounds as points."""
    for place, line in enumerate(lines[:_MOST_BARS]):
        rates = line.values("output_tokens_per_s")
        axes.barh(place, line.median("output_tokens_per_s") or 0.0, alpha=0.7)
        axes.plot(rates, [place] * len(rates), "k.", markersize=4)
    axes.set_yticks(range(len(lines[:_MOST_BARS])), [line.label for line in lines[:_MOST_BARS]])
    axes.invert_yaxis()
    axes.set_xlabel("output tokens per second")


def _shares(axes: Axes, lines: Sequence[RunGroup], name: str, title: str) -> None:
    """Draw which share of all stays below a time, over the rounds' last."""
    drawn = False
    for line in lines[:_MOST_BARS]:
        spread: Spread | None = getattr(line.runs[-1].figures, name)
        if spread is not None:
            axes.plot(spread.curve_s, [each / 100 for each in range(101)], label=line.label)
            drawn = True
    axes.set_xlabel(title)
    axes.set_ylabel("share of all")
    if drawn:
        axes.set_xlim(left=0)
        axes.legend(fontsize="small", loc="lower right")


def _sweep(axes: Axes, lines: Sequence[RunGroup], named: dict[str, str], title: str) -> None:
    """Draw figures along the load, a curve for each system and figure."""
    is_rate = any(line.runs[0].rate is not None for line in lines)
    by_label: dict[str, list[tuple[float, RunGroup]]] = {}
    for line in lines:
        load = line.load
        if is_rate and line.runs[0].rate is None:
            # An end of the sweep: nobody said how often to send, so it stands where it came to.
            load = line.median("requests_per_s")
        if load is not None:
            by_label.setdefault(line.label, []).append((load, line))
    for label, points in by_label.items():
        for mark, name in named.items():
            known = sorted((load, value) for load, point in points if (value := point.median(name)))
            if known:
                name_of_curve = f"{label} {mark}" if len(named) > 1 else label
                axes.plot(*zip(*known), "o-", label=name_of_curve)
    axes.set_xlabel("requests sent per second" if is_rate else "requests at once")
    axes.set_ylabel(title)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(fontsize="small")
