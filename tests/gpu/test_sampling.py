"""Draws on a GPU: the tokens of the specification, and nothing that waits but the last read."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.mixes import peaked_logits, random_masks, random_rows
from tests.helpers.sampling import SETTINGS, make_row, random_logits

from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.reference import sample_each
from lorax_shard.sampling.sampler import SamplesRows, best_method
from lorax_shard.sampling.watermark import Watermark

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]


@pytest.fixture(params=["triton", "tensors"])
def method(request: pytest.FixtureRequest) -> SamplesRows:
    """Each way to draw on a GPU."""
    if request.param == "tensors":
        return draw_batch
    best = best_method(torch.device("cuda"))
    assert best is not draw_batch
    return best


@pytest.mark.parametrize("vocab_size", [257, 1003, 5003, 49_152, 128_259])
def test_a_batch_and_each_row_get_the_specification_s_tokens(
    vocab_size: int, method: SamplesRows
) -> None:
    rows, watermark = random_rows(128, vocab_size, 5), Watermark()
    logits, masks = peaked_logits(128, vocab_size, 5).cuda(), random_masks(128, vocab_size, 5)
    found = method(logits, rows, watermark, masks).read()
    expected = sample_each(logits, rows, watermark, masks)
    assert found.ids == expected.ids
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    for own, wanted in zip(found.alternatives, expected.alternatives, strict=True):
        assert (own and own[0]) == (wanted and wanted[0])
    for index in range(0, 128, 9):
        own = {0: masks[index]} if index in masks else {}
        part = slice(index, index + 1)
        assert method(logits[part], rows[part], watermark, own).read().ids == found.ids[part]


def test_a_batch_of_256_and_each_row_alone_give_the_same_bits(method: SamplesRows) -> None:
    """In a vocabulary that is no multiple of what a GPU reads at once, too."""
    kinds = [{"do_sample": True, **settings} for settings in SETTINGS] + [{"do_sample": False}]
    rows = [make_row([3], [i % 9], seed=i, **kinds[i % len(kinds)]) for i in range(256)]
    logits, watermark = random_logits(256, 50_257, seed=21).cuda(), Watermark()
    together = method(logits, rows, watermark).read()
    for index in range(0, 256, 5):
        alone = method(logits[index : index + 1], rows[index : index + 1], watermark).read()
        assert alone.ids[0] == together.ids[index]
        if kinds[index % len(kinds)]["do_sample"]:
            assert alone.logprobs[0] == together.logprobs[index]


def test_nothing_waits_for_the_device_before_the_results_are_read(method: SamplesRows) -> None:
    rows, logits = random_rows(64, 5003, 6), peaked_logits(64, 5003, 6).cuda()
    watermark = Watermark()
    method(logits, rows, watermark)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        method(logits, rows, watermark)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_a_mix_takes_a_few_launches_however_many_its_rows() -> None:
    from bench.gpu_check.measure import launches

    method, watermark = best_method(torch.device("cuda")), Watermark()
    for num_rows in (1, 256):
        rows = [
            make_row([1, 2], [3], seed=i, do_sample=True, temperature=0.8, top_k=20, top_p=0.9,
                     typical_p=0.9, min_p=0.02, repetition_penalty=1.2, num_alternatives=5)
            for i in range(num_rows)
        ]  # fmt: skip
        logits = random_logits(num_rows, 49_152).cuda()
        found = launches(
            lambda rows=rows, logits=logits: method(logits, rows, watermark), logits.device
        )
        # Five kernels, the softmax, what is asked for and what is drawn.
        assert found.num <= 8, found.kernels
