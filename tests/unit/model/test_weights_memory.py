"""Weights that several ranks read at once must fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.model import weights


def test_ranks_of_one_device_must_fit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1000)}, file)
    cpu = torch.device("cpu")

    def check(free: int, **parts: int) -> None:
        monkeypatch.setattr(weights, "free_bytes", lambda _device: free)
        weights.check_weights([file], torch.float32, cpu, **parts)

    check(1000, num_parts=4)
    check(4000, num_parts=4, parts_here=4)
    for free, parts in (
        (3999, {}),
        (999, {"num_parts": 4}),
        (1999, {"num_parts": 4, "parts_here": 2}),
    ):
        with pytest.raises(StartupError, match="memory are free") as caught:
            check(free, **parts)
        assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY
