"""The elementwise kernels as a GPU would get them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.fake_gpu import run_on_fake_gpu

pytest.importorskip("triton", reason="triton does not run on this platform")

# Compiling takes a while, and much longer on a machine that is busy with other work.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("dtype", "capability"), [("bfloat16", 90), ("float32", 80)])
def test_every_kernel_fits_a_gpu(dtype: str, capability: int, tmp_path: Path) -> None:
    """In its registers; and rows are read by 16 bytes, those of few numbers by what there is."""
    binaries = run_on_fake_gpu(
        "tests.helpers.fused_launches:kernels", dtype, cache=tmp_path, capability=capability
    )
    assert {binary.kernel for binary in binaries} == {
        "rms_norm", "add_norms", "gated", "rotate", "rotate_and_store",
    }  # fmt: skip
    assert [binary for binary in binaries if binary.stack > 0] == []
    assert max(binary.shared for binary in binaries) <= 1 << 10
    rows = [binary for binary in binaries if not binary.kernel.startswith("rotate")]
    assert [binary for binary in rows if binary.narrow_loads] == []
    wide = {binary.kernel for binary in rows if binary.wide_loads}
    assert wide == {"rms_norm", "add_norms", "gated"}


def test_no_number_of_rows_compiles_anew(tmp_path: Path) -> None:
    assert run_on_fake_gpu("tests.helpers.fused_launches:steps", "bfloat16", cache=tmp_path) == []


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_layer_takes_nine_launches(is_fused: bool, tmp_path: Path) -> None:
    """Four products, attention, and four of what lies between; 36 by the model's own code."""
    assert run_on_fake_gpu(
        "tests.helpers.fused_launches:launches_of_a_layer", is_fused, cache=tmp_path
    )
