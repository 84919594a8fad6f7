"""Draws on a GPU: the tokens of the specification, and nothing that waits but the last read."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.mixes import peaked_logits, random_rows

from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.reference import sample_each
from lorax_shard.sampling.watermark import Watermark

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]


@pytest.mark.parametrize("vocab_size", [1003, 49_152])
def test_a_batch_and_each_row_get_the_specification_s_tokens(vocab_size: int) -> None:
    rows, watermark = random_rows(128, vocab_size, 5), Watermark()
    logits = peaked_logits(128, vocab_size, 5).cuda()
    found = draw_batch(logits, rows, watermark).read()
    assert found.ids == sample_each(logits, rows, watermark).ids
    for index in range(0, 128, 9):
        alone = draw_batch(logits[index : index + 1], rows[index : index + 1], watermark).read()
        assert alone.ids == found.ids[index : index + 1]


def test_nothing_waits_for_the_device_before_the_results_are_read() -> None:
    rows, logits = random_rows(64, 5003, 6), peaked_logits(64, 5003, 6).cuda()
    watermark = Watermark()
    draw_batch(logits, rows, watermark)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw_batch(logits, rows, watermark)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
