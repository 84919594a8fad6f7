"""Programs for a GPU that is not there: draws of batches, launch by launch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from tests.helpers.fake_gpu import Compiled, FakeGPU
from tests.helpers.mixes import peaked_logits, random_masks, random_rows
from tests.helpers.sampling import PENALTIES, make_row, random_logits
from torch.utils._python_dispatch import TorchDispatchMode

from lorax_shard.sampling.triton import backend, trial
from lorax_shard.sampling.triton.backend import TritonDraws
from lorax_shard.sampling.watermark import Watermark

# As on a GPU.
backend.softmax_width = lambda vocab_size, _: -(-vocab_size // 4) * 4
# Operations of torch that launch nothing.
_NO_LAUNCHES = {"empty", "empty_like", "view", "slice", "detach", "as_strided", "alias"}
_WARPERS = {"top_k": 20, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.02}
# What a row asks for, and the kernels that draw it. The softmax between them and the copies of what
# is asked for and of what is drawn come to these.
MIXES: tuple[tuple[dict[str, Any], set[str]], ...] = (
    ({}, {"prepare", "choose"}),
    ({"do_sample": True, "temperature": 0.8, "min_p": 0.1}, {"prepare", "choose"}),
    ({"do_sample": True, "top_p": 0.9}, {"prepare", "keep_top", "choose"}),
    ({"do_sample": True, **_WARPERS, **PENALTIES, "watermark": True, "num_alternatives": 5,
      "raw_logprobs": True},
     {"prepare", "keep_top", "keep_typical", "choose", "list_alternatives"}),
)  # fmt: skip


def warm_up() -> TritonDraws:
    """Return what draws, after the batches that a GPU is tried with."""
    method = TritonDraws()
    for logits, rows in trial.batches(torch.device("cpu")):
        method(logits, rows, Watermark())
    return method


def kernels(gpu: FakeGPU) -> list[Compiled]:
    """Return what the trial compiles."""
    warm_up()
    return gpu.binaries


def batches(gpu: FakeGPU) -> list[Compiled]:
    """Return what other batches compile after the trial."""
    method, watermark = warm_up(), Watermark()
    warm = len(gpu.binaries)
    assert warm > 0
    for vocab_size in (1, 40, 256, 1003, 32_000):
        for num_rows in (1, 2, 16, 17):
            rows = random_rows(num_rows, vocab_size, num_rows)
            logits = peaked_logits(num_rows, vocab_size + 3, num_rows)
            for first in range(3):
                method(logits[:, first : first + vocab_size], rows, watermark)
    return gpu.binaries[warm:]


def launches(gpu: FakeGPU) -> list[Compiled]:
    """Return the kernels of batches that take as many launches whatever their number of rows."""
    method, watermark = warm_up(), Watermark()
    for settings, expected in MIXES:
        for num_rows in (1, 256):
            rows = [make_row([1, 2], [3, i % 40], seed=i, **settings) for i in range(num_rows)]
            logits = random_logits(num_rows, 300)
            # The lists of a watermark are made on the host and remembered.
            method(logits, rows, watermark)
            before = gpu.launches.copy()
            masks = random_masks(num_rows, 300, 1)
            with Operations() as operations:
                method(logits, rows, watermark, masks)
            assert gpu.launches - before == Counter(expected), (settings, gpu.launches - before)
            assert operations.names == ["copy_", "softmax"], operations.names
    return gpu.binaries


class Operations(TorchDispatchMode):
    """Notes what torch launches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in _NO_LAUNCHES:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
