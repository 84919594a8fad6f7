"""Steps are timed beside floors that their own numbers give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.helpers.tiny_models import make_tiny_model

from lorax_bench.steps.measure import HEAD, LINEARS, PARTS, MeasuredStep
from lorax_bench.steps.passes import decode_pass, num_blocks, prompt_pass
from lorax_bench.steps.run import measure_steps
from lorax_bench.steps.table import markdown


def test_rows_have_blocks_of_their_own() -> None:
    numbers = decode_pass(5, 35, 16, 100, slots=[3, 8])
    assert numbers.tables.shape == (5, 3)
    assert len(set(numbers.tables.flat)) == num_blocks(5, 35, 16) == 15
    assert (numbers.kv_slots == numbers.tables[:, 2] * 16 + 3).all()
    assert numbers.slots == [3, 8, 3, 8, 3]
    assert numbers.context_lens == [36] * 5
    assert numbers.num_decode_rows == len(numbers.logit_rows) == 5


def test_a_prompt_is_one_row() -> None:
    numbers = prompt_pass(40, 16, 100)
    assert numbers.query_lens == numbers.context_lens == [40]
    assert numbers.tables.tolist() == [[0, 1, 2]]
    assert (numbers.kv_slots == np.arange(40)).all()
    assert numbers.logit_rows.tolist() == [39]


def test_a_floor_is_the_larger_of_memory_and_the_best_library_and_keys_and_values() -> None:
    times = MeasuredStep("8 rows", 8, [0.012, 0.020, 0.013])
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
