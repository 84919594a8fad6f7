"""Arrays that travel to a device together arrive as they were."""

from __future__ import annotations

import numpy as np
import torch

from lorax_shard.transfer import pack, torch_dtype


def test_packed_arrays_are_read_back_where_they_begin() -> None:
    """Of any size and order in memory, each at a multiple of 16 bytes."""
    arrays = [
        np.arange(3, dtype=np.int64),
        np.arange(12, dtype=np.int32).reshape(3, 4)[:, 1:],
        np.empty((0, 5), dtype=np.int64),
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
    ]
    packed, starts = pack(arrays)
    assert all(start % 16 == 0 for start in starts)
    memory = torch.from_numpy(packed)
    for array, start in zip(arrays, starts, strict=True):
        part = memory[start : start + array.nbytes].view(torch_dtype(array.dtype))
        np.testing.assert_array_equal(part.view(array.shape).numpy(), array)
