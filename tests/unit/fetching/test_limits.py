"""What a fetch may map."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_MAPS = """
import mmap, sys
from pathlib import Path
from lorax_shard.fetching import limits
of_fetch = limits.ProcessLimits(memory_bytes=64 << 20)
limits.apply(of_fetch, 1 << 20)
folder = Path(sys.argv[1])
if sys.argv[2] == "told":
    limits.allow_files(of_fetch, folder)
with (folder / "weights").open("rb") as file:
    mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
"""


@pytest.mark.parametrize(("told", "is_mapped"), [("told", True), ("not", False)])
def test_files_are_mapped_besides_what_may_be_used(
    told: str, is_mapped: bool, tmp_path: Path
) -> None:
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(300 << 20)
    run = subprocess.run(
        [sys.executable, "-c", _MAPS, str(tmp_path), told], capture_output=True, check=False
    )
    assert (run.returncode == 0) is is_mapped, run.stderr
