"""``make gpu-check ARGS="--ranks 2"``: in full where there are two GPUs, else over gloo."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.acceptance.harness import Result

ROOT = Path(__file__).parents[3]
RANKS = 2


def point_ranks() -> Result:
    """Run it by make; what its tables say is the figure."""
    import torch

    has_gpus = torch.cuda.device_count() >= RANKS
    with tempfile.TemporaryDirectory() as folder:
        # Of GPUs the tables are results to keep.
        words = f"--ranks {RANKS}" + ("" if has_gpus else f" --small --out {folder}")
        run = subprocess.run(
            ["make", "gpu-check", f"ARGS={words}"], cwd=ROOT, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        print("\n".join(f"    {line}" for line in run.stdout.splitlines()[-25:]), flush=True)
        out = ROOT / "bench" / "results" if has_gpus else Path(folder)
        (path,) = out.glob(f"gpu-check*-ranks-{RANKS}.json")
        document = json.loads(path.read_text())
    ends = {stage["stage"]: stage["status"] for stage in document["stages"]}
    figure = f"{document['machine']['ranks']}: {', '.join(f'{n} {e}' for n, e in ends.items())}"
    tables = {stage["stage"]: stage["tables"][0] for stage in document["stages"] if stage["tables"]}
    ok = run.returncode == 0 and set(ends.values()) == {"ok"} and len(tables) == len(ends)
    return Result(ok, f"{figure}; {'; '.join(_words(tables))}")


def _words(tables: dict[str, dict[str, Any]]) -> list[str]:
    words = []
    for row in _rows(tables.get("ranks-parity")):
        words.append(
            f"{row['model']} {row['dtype']}: {row['largest']:.1e} from one rank at most, "
            f"{row['other tokens']} of {row['tokens']} tokens other, {row['near ties']} near ties"
        )
    for row in _rows(tables.get("ranks-failures")):
        words.append(
            f"{row['rank 1 is']}: noticed after {row['noticed after, s']:.1f} s, back after "
            f"{row['group back after, s']:.1f}, {row['whole']} of {row['streams']} streams whole, "
            f"{row['as undisturbed']} as undisturbed"
        )
    return words


def _rows(table: dict[str, Any] | None) -> list[dict[str, Any]]:
    if table is None:
        return []
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
