"""``auto``: measure the backends on the model's own shapes and pick by row count."""

from __future__ import annotations

import logging
import resource
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from lorax_shard.linear.backends import CompositeBackend
from lorax_shard.linear.interface import LinearBackend, LinearKernel, NamedLinearBackend

logger = logging.getLogger(__name__)

# Row counts that are measured, and the largest row count for which each of them stands.
ROWS = (1, 8, 32, 128)
LIMITS = (1, 16, 64)
_ROUNDS = 6
# Matrices of one shape that are measured in turn: more than a CPU's cache holds, if there are.
_CACHE_BYTES = 48 << 20
_MAX_SHAPES = 3
# What must be worth it: that passes with products of a library's are no programs, and a second
# form of all weights.
_WORTH_IT = 0.75
# More rows that take so much less time than fewer were computed while the machine was quieter.
_DISTURBED = 1.5
# How often in a second others take the processor from a thread that computes on a machine of its
# own: 20 times; beside one other program on two cores 90 times.
_MOST_PREEMPTED = 50.0

# Milliseconds by backend name: one figure per row count.
Table = dict[str, tuple[float, ...]]


def measure(
    weights: Sequence[torch.Tensor], backends: Sequence[LinearBackend], rows: Sequence[int] = ROWS
) -> Table:
    """Return each backend's milliseconds for all ``weights`` (out x in), by row count.

    The shapes with the most bytes are timed and scaled to the number of their matrices.
    Row counts and backends take turns within each round, and the best time of each call counts:
    what other programs do meanwhile then hardly shows, nor that a process's first calls are slow.
    """
    totals = {backend.name: [0.0] * len(rows) for backend in backends}
    counts = Counter((weight.shape, weight.nbytes) for weight in weights)
    largest = sorted(counts, key=lambda key: counts[key] * key[1], reverse=True)[:_MAX_SHAPES]
    for shape, nbytes in largest:
        sample = [weight for weight in weights if weight.shape == shape]
        sample = sample[: max(1, _CACHE_BYTES // nbytes)]
        kernels = {each.name: [each.pack(weight, None) for weight in sample] for each in backends}
        scale = counts[shape, nbytes] / len(sample)
        inputs = [torch.randn(num_rows, shape[1]).to(sample[0].dtype) for num_rows in rows]
        for name, seconds in _best_rounds(kernels, inputs).items():
            for column, best in enumerate(seconds):
                totals[name][column] += best * scale * 1e3
    return {name: tuple(figures) for name, figures in totals.items()}


def _best_rounds(
    kernels: dict[str, list[LinearKernel]], inputs: Sequence[torch.Tensor]
) -> dict[str, list[float]]:
    """Return the seconds of one pass over each backend's kernels, by input, made of each call's best."""
    best = {name: [[float("inf")] * len(group) for _ in inputs] for name, group in kernels.items()}
    for _ in range(_ROUNDS):
        for column, x in enumerate(inputs):
            for name, group in kernels.items():
                times = best[name][column]
                for index, kernel in enumerate(group):
                    start = time.perf_counter()
                    kernel(x)
                    times[index] = min(times[index], time.perf_counter() - start)
    return {name: [sum(times) for times in columns] for name, columns in best.items()}


class Measurement(NamedTuple):
    """Figures, and what measuring them was like."""

    table: Table
    seconds: float
    # Whether nothing else wanted the processors meanwhile, as far as that can be told.
    is_sure: bool


def measure_undisturbed(
    weights: Sequence[torch.Tensor], backends: Sequence[LinearBackend]
) -> Measurement:
    """Return the figures, and whether something else took the machine's time."""
    started, before = time.perf_counter(), _preemptions()
    table = measure(weights, backends)
    seconds = time.perf_counter() - started
    most = _MOST_PREEMPTED * seconds * torch.get_num_threads()
    is_preempted = _preemptions() - before > most
    return Measurement(table, seconds, not (is_preempted or _is_disturbed(table)))


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _is_disturbed(table: Table) -> bool:
    return any(
        fewer > _DISTURBED * more for figures in table.values() for fewer, more in pairwise(figures)
    )


def least_of(table: Table, other: Table) -> Table:
    """Return the better figures of two measurements of the same."""
    return {
        name: tuple(min(pair) for pair in zip(figures, other[name], strict=True))
        for name, figures in table.items()
    }


def choose(
    table: Table, backends: Sequence[NamedLinearBackend], *, may_copy: bool
) -> LinearBackend:
    """Pick the backend with the best figures, or several by row count if that is worth it.

    Each row count weighs the same. ``may_copy`` allows two forms of every weight in memory.
    """
    floor = [min(figures) for figures in zip(*table.values(), strict=True)]

    def slowdown(backend: LinearBackend) -> float:
        figures = zip(table[backend.name], floor, strict=True)
        return float(sum(mine / least for mine, least in figures))

    best = min(backends, key=slowdown)
    own = min((each for each in backends if each.in_programs), key=slowdown, default=best)
    single = best if slowdown(best) < _WORTH_IT * slowdown(own) else own
    picks = tuple(
        single if least >= _WORTH_IT * mine else _fastest(table, backends, column)
        for column, (mine, least) in enumerate(zip(table[single.name], floor, strict=True))
    )
    if not may_copy or all(pick is single for pick in picks):
        return single
    return CompositeBackend(LIMITS, picks)


def _fastest(table: Table, backends: Sequence[LinearBackend], column: int) -> LinearBackend:
    return min(backends, key=lambda backend: table[backend.name][column])


def log_table(table: Table) -> None:
    """Log the figures, one line."""
    parts = (
        f"{name} {' / '.join(f'{figure:.1f}' for figure in figures)}"
        for name, figures in table.items()
    )
    logger.info(
        "linears of one step at %s rows, ms: %s",
        " / ".join(map(str, ROWS)),
        "; ".join(parts),
        extra={"fields": {"event": "linear_probe", "rows": ROWS, "ms": table}},
    )
