"""Steps are timed beside floors that their own numbers give."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.tiny_models import make_tiny_model

from lorax_bench.steps.measure import HEAD, LINEARS, PARTS, MeasuredStep
from lorax_bench.steps.run import measure_steps
from lorax_bench.steps.table import markdown


def test_a_floor_is_the_larger_of_memory_and_the_best_library_and_keys_and_values() -> None:
    times = MeasuredStep("8 rows", 8, 8, [0.012, 0.020, 0.013])
    times.libraries = {"torch": [0.02, 0.03, 0.04], "onednn": [0.005, 0.012, 0.009]}
    times.weights_s, times.kv_s = 0.010, 0.001
    assert times.products_s == 0.009
    assert times.floor_s == pytest.approx(0.011)
    assert times.ratios == pytest.approx([12 / 11, 20 / 13, 13 / 11])
    assert "| **step over floor** | 1.18 (1.09 to 1.54) |" in markdown([times])


def test_steps_of_a_model_are_timed_by_part(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    steps = measure_steps(tmp_path, [1, 3], [20], context=20, rounds=2, calls=2, linear="panel")
    assert [each.name for each in steps] == ["1 rows", "3 rows", "prompt of 20"]
    for each in steps:
        assert set(each.parts) == set(PARTS)
        assert each.parts[LINEARS] > 0 < each.parts[HEAD]
        assert len(each.step) == 2 == len(each.ratios)
        assert "torch" in each.libraries
        assert all(seconds > 0 for seconds in each.beside.values())
