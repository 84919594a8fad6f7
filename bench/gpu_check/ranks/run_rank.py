"""Run one rank of a group in this process: ``MODULE FOLDER RANK WORLD_SIZE [--small]``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from bench.gpu_check.ranks.group import RankSeat


def main() -> int:
    """Compute what the module says; it writes what it found into the folder."""
    module, folder, rank, world_size, *flags = sys.argv[1:]
    seat = RankSeat(int(rank), int(world_size), Path(folder), "--small" in flags)
    importlib.import_module(module).compute(seat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
