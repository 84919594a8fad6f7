"""Run an acceptance list: ``python -m tests.acceptance serve [point ...]``."""

from __future__ import annotations

import importlib
import sys

from tests.acceptance.harness import run_points

NAMES = ("serve", "adapters", "parallel", "ground", "clients", "scheduling", "engine", "speed",
         "faults", "look", "scale", "encoders", "experts")  # fmt: skip
# Where a list is not the module of its name.
MODULES = {
    "clients": "clients.points",
    "scheduling": "scheduling.points",
    "engine": "engine.points",
    "speed": "speed.points",
    "faults": "faults.points",
    "look": "look.points",
    "scale": "scale.points",
    "encoders": "encoders.points",
    "experts": "experts.points",
}


def main() -> int:
    """Run the named list; further arguments restrict it to these points."""
    name, *only = sys.argv[1:] or [""]
    if name not in NAMES:
        print(f"usage: python -m tests.acceptance {{{','.join(NAMES)}}} [point ...]")
        return 2
    points = importlib.import_module(f"tests.acceptance.{MODULES.get(name, name)}").POINTS
    return run_points(points, set(only))


if __name__ == "__main__":
    sys.exit(main())
