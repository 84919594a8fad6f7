"""The table that an acceptance run prints: point, figure, ok or short."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

# What points share, servers among it: closed after the last point.
SHARED = ExitStack()


@dataclass(frozen=True, slots=True)
class Result:
    """What a point measured, and whether that is enough."""

    ok: bool
    figure: str


@dataclass(frozen=True, slots=True)
class Point:
    """One line of a "Done means" list."""

    number: str
    title: str
    measure: Callable[[], Result]


def run_points(points: list[Point], only: set[str]) -> int:
    """Measure the points, print a table, return the exit code (1 if anything is short)."""
    known = [point.number for point in points]
    if unknown := sorted(only.difference(known)):
        print(f"no such point: {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    with SHARED:
        return _run_points(points, only)


def _run_points(points: list[Point], only: set[str]) -> int:
    rows: list[tuple[Point, Result, float]] = []
    for point in points:
        if only and point.number not in only:
            continue
        print(f"--- {point.number} {point.title}", flush=True)
        start = time.perf_counter()
        try:
            result = point.measure()
        except Exception as error:
            traceback.print_exc()
            result = Result(False, f"{type(error).__name__}: {error}".splitlines()[0][:160])
        seconds = time.perf_counter() - start
        verdict = "ok" if result.ok else "SHORT"
        print(f"    {verdict} in {seconds:.0f} s: {result.figure}", flush=True)
        rows.append((point, result, seconds))
    print(f"\n{'point':<6} {'':<6} {'seconds':>7}  what | figure")
    for point, result, seconds in rows:
        verdict = "ok" if result.ok else "SHORT"
        print(f"{point.number:<6} {verdict:<6} {seconds:>7.0f}  {point.title} | {result.figure}")
    sys.stdout.flush()
    return int(not rows or not all(result.ok for _, result, _ in rows))
