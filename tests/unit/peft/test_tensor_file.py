"""Tensors written one at a time are what safetensors reads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from lorax_shard.peft.tensor_file import write_tensors


def test_views_of_all_types_are_written(tmp_path: Path) -> None:
    whole = torch.randn(4, 6, 5)
    tensors = {
        "odd": torch.randn(3).half(),
        "turned": whole.permute(2, 0, 1),
        "spread": whole[:1].expand(7, 6, 5),
        "brain": whole[1].T.bfloat16(),
        "none": torch.empty(0, 3),
        'name with "quotes" and ü': whole[2],
    }
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, tensors)
    again = load_file(path)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    # What is spread over experts is there for each of them.
    assert path.stat().st_size > 7 * 30 * 4
