"""Traces of one's own, from a CSV or JSON file."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorax_router.simulator.trace import ClientKind, Trace

_NEEDED = ("time", "adapter", "prompt_tokens", "output_tokens")


def recorded(path: str, *, clients: ClientKind = "tenants") -> Trace:
    """Read ``file:PATH``: a table with a header, or JSON objects (a list, or one a line).

    Columns: ``time`` in seconds, ``adapter`` (empty: the base model), ``prompt_tokens``,
    ``output_tokens``; where they are given, ``tenant`` (else each adapter is its own tenant),
    ``weight`` of the tenant, ``max_new_tokens``, ``priority`` and ``rank`` of the adapter.
    """
    rows = sorted(_read(Path(path)), key=lambda row: float(row["time"]))
    adapters = _NameColumn(["", *(str(row["adapter"]) for row in rows)])
    if clients == "adapters":
        owners = ["tenant-0"] * len(rows)
    else:
        owners = [str(row.get("tenant") or row["adapter"] or "base") for row in rows]
    tenants = _NameColumn(owners)
    outputs = _column(rows, "output_tokens", 0)
    start = float(rows[0]["time"]) if rows else 0.0
    weights = {o: float(row.get("weight") or 1.0) for o, row in zip(owners, rows)}
    ranks = {str(row["adapter"]): int(row.get("rank") or 16) for row in rows}
    return Trace(
        name=f"file:{Path(path).name}",
        times=np.array([float(row["time"]) - start for row in rows], dtype=np.float64),
        tenants=tenants.indices(owners),
        adapters=adapters.indices([str(row["adapter"]) for row in rows]),
        prompts=_column(rows, "prompt_tokens", 0),
        outputs=outputs,
        limits=np.maximum(_column(rows, "max_new_tokens", 0), outputs),
        priorities=_column(rows, "priority", 0),
        tenant_names=tenants.names,
        tenant_weights=tuple(weights[name] for name in tenants.names),
        adapter_names=("base", *adapters.names[1:]),
        adapter_ranks=(0, *(ranks[name] for name in adapters.names[1:])),
    )


class _NameColumn:
    """Distinct names in order of their appearance."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._places = {name: i for i, name in enumerate(self.names)}

    def indices(self, names: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([self._places[name] for name in names], dtype=np.int64)


def _column(
    rows: Sequence[Mapping[str, Any]], name: str, default: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([int(row.get(name) or default) for row in rows], dtype=np.int64)


def _read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    if path.suffix == ".csv":
        rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines()))
    elif text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        missing = [name for name in _NEEDED if name not in row]
        if missing:
            raise ValueError(f"{path}: request {number} has no {' and no '.join(missing)}")
        row["adapter"] = row["adapter"] or ""
    return rows
