"""Keeps what ``auto`` measured, so that only the first start of a model on a machine measures."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lorax_contract.cache import default_cache_dir
from lorax_shard.cache import cpu_identity
from lorax_shard.linear.interface import LinearBackend
from lorax_shard.linear.measure import ROWS, Table

logger = logging.getLogger(__name__)


class KeptFigures(NamedTuple):
    """What an earlier start measured, and whether the machine was its own meanwhile."""

    table: Table
    is_sure: bool


def table_path(weights: Sequence[torch.Tensor], backends: Sequence[LinearBackend]) -> Path:
    """Return the file for one measurement, named by all that its figures depend on."""
    shapes = Counter((*weight.shape, str(weight.dtype)) for weight in weights)
    parts = [
        *cpu_identity(), torch.__version__, torch.get_num_threads(), ROWS,
        [backend.name for backend in backends], sorted(shapes.items()),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return default_cache_dir() / "linears" / f"{digest}.json"


def recall(path: Path, backends: Sequence[LinearBackend]) -> KeptFigures | None:
    """Return the figures that were kept, or None if there are none that can be used."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kept = document["ms"]
        table = {each.name: tuple(float(ms) for ms in kept[each.name]) for each in backends}
        is_sure = document["is_sure"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return None
    usable = all(len(row) == len(ROWS) and min(row) > 0 for row in table.values())
    return KeptFigures(table, is_sure) if usable else None


def remember(path: Path, table: Table, *, is_sure: bool) -> None:
    """Keep the figures; a cache folder that cannot be written costs the next start its time."""
    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"ms": table, "is_sure": is_sure}
        scratch.write_text(json.dumps(document), encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        logger.warning("the linears are measured again at the next start: %s", error)
