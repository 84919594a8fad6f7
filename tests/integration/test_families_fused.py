"""Every tested family with all elementwise work fused that can be, adapters and ranks among it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tests.helpers.family_rows import FamilyRows
from tests.helpers.fused_together import NAME, FusedTogether, together  # noqa: F401 - a fixture
from tests.helpers.schedules import chunked, preempted, ragged

from lorax_shard.model.families import TESTED_FAMILIES

# It turns a part of each head and puts that beside the rest.
TURNED_FIRST = {"phi"}
NOT_TURNED = {"deepseek_v2", "deepseek_v3", "gpt2", "gpt_bigcode", "llama4_text", "opt"}


@pytest.mark.parametrize("family", sorted(TESTED_FAMILIES))
def test_family_with_two_adapters_and_on_three_ranks(
    family: str,
    tmp_path: Path,
    together: type[FusedTogether],  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = FamilyRows(family, tmp_path, elementwise=NAME)
    together.calls.clear()
    for schedule in (ragged, chunked, preempted):
        rows.run(schedule)
    calls = together.calls
    assert (calls["rotate_and_store"] > 0) is (family not in TURNED_FIRST | NOT_TURNED)
    assert (calls["rotate"] > 0) is (family in TURNED_FIRST)
    caplog.set_level(logging.INFO)
    rows.run_ranks(chunked, 3)
    # Else the load-time probe has found a difference.
    assert "left to its own code" not in caplog.text


@pytest.mark.slow
# Triton's interpreter computes in numpy.
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_a_family_by_the_kernels_of_gpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton", reason="triton does not run on this platform")
    FamilyRows("gemma3_text", tmp_path, elementwise="triton").run(ragged)
    assert "left to its own code" not in caplog.text
