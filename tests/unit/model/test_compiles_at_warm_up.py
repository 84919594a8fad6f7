"""What a GPU computes steps with is compiled before the first of them, and fits the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.fake_gpu import run_on_fake_gpu

pytest.importorskip("triton", reason="triton does not run on this platform")

PROGRAMS = "tests.helpers.gpu_launches"


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["lora_steps", "model_steps"])
def test_no_step_waits_for_a_compiler_after_the_warm_up(steps: str, tmp_path: Path) -> None:
    """Whatever rows, lengths, ranks and slots it has."""
    assert run_on_fake_gpu(f"{PROGRAMS}:{steps}", cache=tmp_path) == []
