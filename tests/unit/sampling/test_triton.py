"""Draws in Triton give the tokens of the specification: in the interpreter, which stands in for a GPU.

Programs look at few values at a time here, so that they go through all that a large vocabulary
takes them through.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.helpers.mixes import peaked_logits, random_masks, random_rows
from tests.helpers.sampling import PENALTIES, SETTINGS, FakeRow, make_row, random_logits

from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.masks import forbid
from lorax_shard.sampling.reference import sample_each
from lorax_shard.sampling.sampled import ALL_MASKED, SampledTokens
from lorax_shard.sampling.sampler import Sampler
from lorax_shard.sampling.watermark import Watermark

pytest.importorskip("triton", reason="triton does not run on this platform")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here: see tests/gpu", allow_module_level=True)

from lorax_shard.sampling.triton import trial
from lorax_shard.sampling.triton.backend import TritonDraws
from lorax_shard.sampling.triton.upload import KeptPrompts

# Tiny temperatures and logits that are not finite: rightly so.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
CPU = torch.device("cpu")
SMALL = TritonDraws(block=256, capacity=64)


def drawn(logits: torch.Tensor, rows: Sequence[FakeRow]) -> SampledTokens:
    return Sampler(logits.shape[1], method=SMALL).sample(logits, rows)


def compare(logits: torch.Tensor, rows: Sequence[FakeRow]) -> None:
    """Draw, and compare everything with the specification."""
    found = drawn(logits, rows)
    expected = Sampler(logits.shape[1], method=sample_each).sample(logits, rows)
    assert found.ids == expected.ids
    assert found.errors == expected.errors
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    for own, wanted in zip(found.alternatives, expected.alternatives, strict=True):
        assert (own is None) == (wanted is None)
        if own is not None and wanted is not None:
            assert own[0] == wanted[0]
            assert own[1] == pytest.approx(wanted[1], abs=1e-5)


@pytest.mark.parametrize("vocab_size", [1, 2, 40, 255, 256, 257, 1021])
def test_random_mixes_give_what_the_specification_gives(vocab_size: int) -> None:
    rows, logits = random_rows(16, vocab_size, 4), peaked_logits(16, vocab_size, 4)
    # Some forbidden, some not numbers.
    logits[::5, vocab_size // 2 :] = -torch.inf
    logits[7, vocab_size // 3] = torch.nan
    logits[9, vocab_size // 3] = torch.inf
    compare(logits, rows)


def test_each_parameter_alone_gives_what_the_specification_gives() -> None:
    kinds = [{"do_sample": True, **settings} for settings in SETTINGS]
    kinds += [{"do_sample": False}, {"do_sample": False, **PENALTIES, "num_alternatives": 3},
              {"do_sample": True, "top_p": 0.9, "num_alternatives": 5, "raw_logprobs": True}]  # fmt: skip
    rows = [make_row([i % 7, 3], [2, i], seed=i, **kind) for i, kind in enumerate(kinds)]
    compare(random_logits(len(rows), 600, seed=21), rows)


def test_a_batch_and_each_row_alone_give_the_same_bits() -> None:
    rows, logits = random_rows(12, 300, 8), peaked_logits(12, 300, 8)
    together = drawn(logits, rows)
    for index in range(12):
        alone = drawn(logits[index : index + 1].clone(), rows[index : index + 1])
        assert (alone.ids[0], alone.logprobs[0], alone.alternatives[0]) == (
            together.ids[index], together.logprobs[index], together.alternatives[index],
        )  # fmt: skip


def test_masked_rows_draw_what_their_masks_leave() -> None:
    rows, masks = random_rows(12, 300, 9), random_masks(12, 300, 9)
    logits = peaked_logits(12, 300, 9)
    before = logits.clone()
    found = SMALL(logits, rows, Watermark(), masks).read()
    assert torch.equal(logits, before)
    assert found == drawn(forbid(logits, masks), rows)
    assert found.errors[11] == ALL_MASKED


def test_equal_tokens_are_kept_alike() -> None:
    """Logits of 16-bit models have many equal values: ties decide where a limit lies."""
    logits = torch.round(random_logits(18, 500, seed=23, scale=1.5) * 2) / 2
    rows = [make_row(do_sample=True, seed=i, top_p=0.05 + i / 20, top_k=(i % 3) * 40,
                     typical_p=(1.0, 0.6)[i % 2], num_alternatives=3) for i in range(18)]  # fmt: skip
    compare(logits, rows)


def test_limits_that_leave_one_token_or_all() -> None:
    limits = [{"top_p": 0.0}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"top_k": 10_000},
              {"top_p": 1 - 2**-53}, {"typical_p": 1e-9}, {"typical_p": 0.0}, {"min_p": 7.0},
              {"typical_p": 0.5}]  # fmt: skip
    rows = [make_row(do_sample=True, seed=i, **each) for i, each in enumerate(limits)]
    for logits in (random_logits(1, 600, seed=24), torch.zeros(1, 600)):
        compare(logits.expand(len(rows), -1), rows)


def test_tiny_temperatures_and_chances_give_what_the_specification_gives() -> None:
    logits = random_logits(6, 500, seed=30)
    logits[:, 100:] -= 200.0
    rows = [make_row(do_sample=True, seed=i, temperature=(1e-45, 1e-9, 0.05, 1.0, 3.0, 40.0)[i],
                     top_k=300, num_alternatives=4) for i in range(6)]  # fmt: skip
    compare(logits, rows)


def test_every_word_of_a_seed_and_a_position_counts() -> None:
    ids = list(range(20)) * 10
    seeds = (0, 1, 2**32 - 1, 2**32, 2**63 - 1, 0x9E3779B97F4A7C15 >> 1)
    rows = [make_row(ids[: 3 + i], do_sample=True, seed=seed) for i, seed in enumerate(seeds)]
    compare(torch.zeros(len(rows), 900), rows)


def test_ids_beyond_the_vocabulary_are_no_fault_of_penalties() -> None:
    logits = random_logits(2, 30, seed=25)
    rows = [make_row([35, 1, -1], [39, 2], do_sample=each, **PENALTIES) for each in (False, True)]
    compare(logits, rows)


def test_many_tokens_so_far_count_as_often_as_they_came() -> None:
    ids = [number**2 % 37 for number in range(700)]
    rows = [make_row(ids[:300], ids[300:], do_sample=each, **PENALTIES) for each in (False, True)]
    compare(random_logits(2, 300, seed=31), rows)


def test_uploads_do_not_grow_with_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie on the device from the first draw on: a prompt stays as it is."""
    sizes, copy = [], torch.Tensor.copy_

    def noting(self: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        if isinstance(args[0], torch.Tensor) and self.dtype is torch.uint8:
            sizes.append(self.nbytes)
        return copy(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", noting)
    rows = [make_row([1, 2] * length, [3, 4], do_sample=True, **PENALTIES) for length in (1, 9000)]
    for row in rows:
        compare(random_logits(1, 40, seed=34), [row])
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]


def test_prompts_that_are_kept_are_bounded_and_are_those_that_were_given() -> None:
    kept = KeptPrompts(max_bytes=4000)
    prompts = [np.arange(number, number + 300) for number in range(8)]
    for prompt in prompts:
        found = kept.find(prompt, CPU)
        assert found is not None
        assert kept.find(prompt, CPU) is found
        assert found.tolist() == prompt.tolist()
    assert kept.find(prompts[0].copy(), CPU) is not kept.find(prompts[0], CPU)
    assert kept.find(np.arange(2000), CPU) is None
    assert kept.nbytes <= 4000


def test_logits_lie_wherever_they_do_and_stay_as_they_are() -> None:
    wide = random_logits(5, 307, seed=32)
    rows = random_rows(5, 300, 3)
    for first in range(3):
        logits = wide[:, first : first + 300]
        before = logits.clone()
        compare(logits, rows)
        assert torch.equal(logits, before)
    half = wide[:, :300].bfloat16()
    assert SMALL(half, rows, Watermark()).read().ids == drawn(half.float(), rows).ids


def test_ids_stay_where_they_are_drawn_and_rows_may_fail() -> None:
    logits = random_logits(3, 40, seed=33)
    logits[1] = torch.nan
    draws = SMALL(logits, [make_row(seed=i, do_sample=True) for i in range(3)], Watermark())
    assert draws.on_device.dtype is torch.int64
    draws.fail(2, "its constraint broke")
    tokens = draws.read()
    assert draws.on_device.tolist() == tokens.ids
    assert tokens.ids[1:] == [-1, -1]
    assert tokens.errors[2] == "its constraint broke"


def test_the_trial_finds_no_fault() -> None:
    assert trial.failure(TritonDraws(), CPU) is None


def test_kernels_that_draw_other_tokens_or_fail_are_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def others(self, logits, rows, watermark):
        return draw_batch(-logits, rows, watermark)

    monkeypatch.setattr(TritonDraws, "__call__", others)
    assert "of 9 tokens otherwise" in str(trial.failure(TritonDraws(), CPU))

    def fails(self, logits, rows, watermark):
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nmore")

    monkeypatch.setattr(TritonDraws, "__call__", fails)
    words = str(trial.failure(TritonDraws(), CPU))
    assert words.endswith("(RuntimeError: PTX was compiled with an unsupported toolchain)")
