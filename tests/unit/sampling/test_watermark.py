"""The watermark: LoRAX's formula, on every row alone."""

import itertools

import pytest
import torch
from tests.helpers.sampling import make_row, random_logits

from lorax_shard.sampling.sampler import Sampler
from lorax_shard.sampling.scores import adjusted
from lorax_shard.sampling.watermark import Watermark


def green_list(previous_id: int, vocab_size: int, gamma: float) -> list[int]:
    """Return the preferred tokens as LoRAX and TGI find them."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(15485863 * previous_id)
    permutation = torch.randperm(vocab_size, device="cpu", generator=generator)
    return permutation[: int(vocab_size * gamma)].tolist()


@pytest.mark.parametrize("vocab_size", [7, 300, 49_152])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0])
def test_the_preferred_tokens_are_loraxs(vocab_size, gamma):
    watermark = Watermark(gamma, 2.0)
    for previous_id in (0, 1, vocab_size - 1, 1):
        preferred = watermark.preferred(previous_id, vocab_size)
        assert preferred.nonzero()[0].tolist() == sorted(green_list(previous_id, vocab_size, gamma))


def test_scores_are_loraxs_to_the_bit():
    logits = random_logits(4, 1000, seed=3)
    watermark = Watermark(0.3, 1.7)
    for at, previous_id in enumerate((5, 999, 0, 5)):
        expected = logits[at].clone()
        green = green_list(previous_id, 1000, 0.3)
        expected[green] = expected[green] + 1.7
        row = make_row([1], [previous_id], watermark=True)
        found = adjusted(logits[at : at + 1], [row], [0], watermark)
        assert torch.equal(found[0], expected)


def test_the_last_token_seeds_each_row_and_rows_without_it_stay_as_they_are():
    logits = torch.zeros(5, 50)
    rows = [make_row([1, 2], [6], watermark=True), make_row([1, 6], [], watermark=True),
            make_row([6], [2], watermark=True), make_row([1], [6]),
            make_row([3], [6], watermark=True, do_sample=True, temperature=0.01)]  # fmt: skip
    sampled = Sampler(50, watermark=Watermark(0.5, 3.0)).sample(logits, rows)
    six, two = (green_list(previous, 50, 0.5) for previous in (6, 2))
    assert sampled.ids[0] == sampled.ids[1] == min(six)
    assert sampled.ids[2] == min(two)
    assert sampled.ids[3] == 0
    assert sampled.ids[4] in six


def test_a_marked_text_is_told_from_an_unmarked_one():
    def share_of_green(marked):
        ids, sampler = [7], Sampler(400, watermark=Watermark(0.5, 4.0))
        for step in range(100):
            row = make_row([7], ids[1:], watermark=marked, do_sample=True, seed=step)
            ids += sampler.sample(random_logits(1, 400, seed=step), [row]).ids
        pairs = itertools.pairwise(ids)
        return sum(token in green_list(before, 400, 0.5) for before, token in pairs) / 100

    assert share_of_green(True) > 0.85
    assert 0.3 < share_of_green(False) < 0.7
