"""Tensors written one at a time are what safetensors reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorax_shard.peft.tensor_file import TensorFile, write_tensors


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


def test_a_tensor_is_found_and_read(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    tensors = {"one": torch.randn(3, 4), "two": torch.randn(5).bfloat16()}
    write_tensors(path, tensors)
    with TensorFile(path) as file:
        for name, tensor in tensors.items():
            stored = file.find(name)
            assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
            data = bytearray(stored.nbytes)
            file.read(stored.start, memoryview(data))
            assert torch.equal(
                torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape), tensor
            )
        with pytest.raises(KeyError):
            file.find("three")


@pytest.mark.parametrize(
    "change",
    [
        ("[0,48]", "[0,49]"),
        ("[0,48]", "[9,57]"),
        ("[3,4]", "[3,5]"),
        ("[3,4]", "[-3,-4]"),
        ("F32", "F64"),
        ('"shape"', '"shade"'),
        ("{", "["),
    ],
)
def test_a_damaged_head_is_no_tensor(change: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, {"one": torch.randn(3, 4)})
    content = path.read_bytes()
    old, new = (each.encode() for each in change)
    assert old in content
    # The head keeps its length.
    changed = content.replace(old, new, 1).replace(b" " * max(0, len(new) - len(old)), b"", 1)
    path.write_bytes(changed[: len(content)])
    with pytest.raises((ValueError, KeyError, TypeError)), TensorFile(path) as file:
        file.find("one")


def test_a_file_that_is_cut_off_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, {"one": torch.randn(3, 4)})
    content = path.read_bytes()
    for size in (0, 7, 20, len(content) - 1):
        path.write_bytes(content[:size])
        with (
            pytest.raises(ValueError, match="ends too early|does not lie"),
            TensorFile(path) as file,
        ):
            file.find("one")
