"""The kernels that draw, as a GPU would get them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.fake_gpu import run_on_fake_gpu

pytest.importorskip("triton", reason="triton does not run on this platform")

# Compiling takes a while, and much longer on a machine that is busy with other work.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROGRAMS = "tests.helpers.draw_launches"


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_fits_a_gpu(capability: int, tmp_path: Path) -> None:
    """In its registers; and rows are read by 16 bytes."""
    binaries = run_on_fake_gpu(f"{PROGRAMS}:kernels", cache=tmp_path, capability=capability)
    names = sorted(binary.kernel for binary in binaries)
    # One variant of each; the first kernel reads logits, wherever they begin.
    assert names == ["choose", "keep_top", "keep_typical", "list_alternatives", *2 * ["prepare"]]
    assert [binary for binary in binaries if binary.stack > 0] == []
    assert max(binary.shared for binary in binaries) <= 99 << 10
    assert [binary for binary in binaries if not binary.wide_loads] == []


def test_no_batch_compiles_anew(tmp_path: Path) -> None:
    """Whatever its rows, its vocabulary, its mix and where its logits begin."""
    assert run_on_fake_gpu(f"{PROGRAMS}:batches", cache=tmp_path) == []


def test_any_mix_takes_a_few_launches_however_many_its_rows(tmp_path: Path) -> None:
    assert run_on_fake_gpu(f"{PROGRAMS}:launches", cache=tmp_path)
