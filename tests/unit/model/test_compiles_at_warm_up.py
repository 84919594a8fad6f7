"""What a GPU computes steps with is compiled before the first of them, and takes few launches."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.fake_gpu import run_on_fake_gpu

pytest.importorskip("triton", reason="triton does not run on this platform")

# Compiling takes a minute or two, and much longer on a machine that is busy with other work.
pytestmark = pytest.mark.timeout(900)
PROGRAMS = "tests.helpers.gpu_launches"


# As models are made, and such as agree with no unit that kernels read in.
EVEN = (256, 512, 1, 4, 2, 1000)
ODD = (96, 72, 1, 4, 2, 100)
ONE_KV_HEAD = (40, 24, 1, 1, 1, 33)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "sizes"),
    [("lora_steps", ()), ("model_steps", EVEN), ("model_steps", ODD), ("model_steps", ONE_KV_HEAD)],
    ids=["lora", "even", "odd", "one KV head"],
)
def test_no_step_waits_for_a_compiler_after_the_warm_up(
    steps: str, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    """Whatever rows, lengths, ranks and slots it has: each number of rows from 1 to 256, any mix."""
    assert run_on_fake_gpu(f"{PROGRAMS}:{steps}", *sizes, cache=tmp_path) == []


@pytest.mark.slow
def test_a_step_takes_two_launches_a_group_of_linears_whatever_its_adapters(tmp_path: Path) -> None:
    """And two a layer for attention, a third where a row is split."""
    assert run_on_fake_gpu(f"{PROGRAMS}:launches_of_steps", cache=tmp_path)
