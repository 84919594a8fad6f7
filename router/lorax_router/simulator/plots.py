"""Plots: service by client over time, and how long people wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorax_router.simulator.driver import SimulatedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Curves that an eye can follow.
_MAX_CURVES = 10
# Points of a curve, so that a file of a day stays small.
_MAX_POINTS = 500


class PlotsUnavailableError(Exception):
    """matplotlib is not installed."""


def save_plots(runs: Sequence[SimulatedRun], path: Path) -> None:
    """Write one figure, SVG or PNG by the name: service per policy, then the two CDFs."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotsUnavailableError(
            "plots need matplotlib: install lorax-py[plots], or leave --plot out"
        ) from None
    # The same runs give the same file.
    mpl.rcParams["svg.hashsalt"] = "lorax-simulate"
    figure = Figure(figsize=(5 * max(len(runs), 2), 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    each = np.atleast_1d(upper.subplots(1, len(runs), sharey=True))
    for axes, run in zip(each, runs):
        _plot_service(axes, run)
    first, between = lower.subplots(1, 2)
    for run in runs:
        _plot_cdf(first, run.first_token_at - run.trace.times, run.policy)
        _plot_cdf(between, run.token_gaps, run.policy)
    first.set_xlabel("time to first token, s")
    between.set_xlabel("time between tokens, s")
    for axes in (first, between):
        axes.set_xscale("log")
        axes.set_ylabel("share of all")
        axes.legend()
    # A date in the file would make each run's differ.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)


def _plot_service(axes: Axes, run: SimulatedRun) -> None:
    """Draw the service of the clients that got most, per second."""
    meter = run.meter
    total = np.array(meter.series)
    rates = np.diff(total, axis=0, prepend=0.0) / meter.window_s
    times = (np.arange(len(total)) + 1) * meter.window_s
    most = sorted(np.argsort(-total[-1], kind="stable")[:_MAX_CURVES])
    for place in most:
        name = run.trace.client_names[meter.compared[place]]
        axes.plot(times, _smooth(rates[:, place]), label=name, linewidth=1)
    axes.set_title(run.policy)
    axes.set_xlabel("time, s")
    axes.set_ylabel("service, weighted tokens/s")
    axes.legend(fontsize="small")


def _smooth(values: npt.NDArray[Any], width: int = 5) -> npt.NDArray[Any]:
    """Return the mean over a few windows."""
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _plot_cdf(axes: Axes, values: npt.NDArray[Any], label: str) -> None:
    if not len(values):
        return
    shares = np.linspace(0, 1, _MAX_POINTS)
    axes.plot(np.quantile(values, shares), shares, label=label, linewidth=1)
