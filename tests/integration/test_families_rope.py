"""Positions beyond a pretrained length: what each kind of scaled RoPE computes in a batch.

Kinds with frequencies of their own for each length are served up to where those begin; the
tests show that this is needed, and that the others need no limit.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.family_rows import FamilyRows
from tests.helpers.paged_runner import LogitsDifferError
from tests.helpers.schedules import LENGTHS, SCHEDULES, ragged

LONGEST = max(LENGTHS)
_THETA = {"rope_theta": 10000.0}
_PRETRAINED = {"original_max_position_embeddings": 16}
FIXED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 8.0, **_PRETRAINED},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_PRETRAINED},
}


def longrope(threshold: int) -> dict[str, Any]:
    """Return overrides of a tiny Phi 3 whose frequencies change beyond ``threshold``."""
    return {
        "original_max_position_embeddings": threshold,
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": threshold,
            **_THETA,
        },
    }


def dynamic(configured: int) -> dict[str, Any]:
    """Return overrides of a tiny Llama whose frequencies change beyond ``configured``."""
    return {
        "max_position_embeddings": configured,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **_THETA},
    }


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_frequencies_serve_long_rows_beside_short_ones(kind: str, tmp_path: Path) -> None:
    parameters = {"rope_type": kind, **FIXED[kind], **_THETA}
    rows = FamilyRows("llama", tmp_path, rope_parameters=parameters)
    assert rows.model.max_positions == 512
    for schedule in SCHEDULES:
        rows.run(schedule)


@pytest.mark.parametrize(
    ("family", "at_limit", "below"),
    [
        pytest.param("phi3", longrope(LONGEST), longrope(24), id="longrope"),
        pytest.param("llama", dynamic(LONGEST), dynamic(24), id="dynamic"),
    ],
)
def test_frequencies_by_length_are_served_up_to_where_they_change(
    family: str,
    at_limit: dict[str, Any],
    below: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        rows = FamilyRows(family, tmp_path / "limit", **at_limit)
    assert "so sequences end there" in caplog.text
    assert rows.model.max_positions == LONGEST
    for schedule in SCHEDULES:
        rows.run(schedule)

    # A row beyond the limit changes what the rows beside it compute.
    rows = FamilyRows(family, tmp_path / "beyond", **below)
    assert rows.model.max_positions == 24 < LONGEST
    with pytest.raises(LogitsDifferError):
        rows.run(ragged)
