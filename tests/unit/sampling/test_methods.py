"""Every way to draw gives the tokens of the specification, whatever else is in the batch."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.mixes import peaked_logits, random_masks, random_rows
from tests.helpers.sampling import PENALTIES, SETTINGS, make_row, random_logits
from tests.helpers.sampling_methods import method_of
from torch.utils._python_dispatch import TorchDispatchMode

from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.id_tree import to_weights
from lorax_shard.sampling.kernel import DrawKernel
from lorax_shard.sampling.masks import forbid
from lorax_shard.sampling.reference import sample_each
from lorax_shard.sampling.sampled import ALL_MASKED
from lorax_shard.sampling.sampler import Sampler, best_method
from lorax_shard.sampling.watermark import Watermark

# Tokens of random mixes as they were drawn when sums were those of floating-point numbers, row by
# row: by vocabulary, for as many rows as there are.
RECORDED = json.loads(Path(__file__).with_name("recorded_draws.json").read_text())
# One row of each kind, and some of everything at once.
MIX = [
    {"do_sample": False},
    {"do_sample": False, **PENALTIES, "num_alternatives": 3},
    *({"do_sample": True, **settings} for settings in SETTINGS),
    {"do_sample": True, "top_p": 0.9, "num_alternatives": 5, "raw_logprobs": True},
]


def everything_of(sampled, index):
    return sampled.ids[index], sampled.logprobs[index], sampled.alternatives[index]


def mixed_rows(num_rows):
    return [make_row([i % 7, 3], [2, i % 50], seed=i, **MIX[i % len(MIX)]) for i in range(num_rows)]


@pytest.mark.parametrize("vocab_size", [int(size) for size in RECORDED])
def test_tokens_are_those_that_were_drawn_row_by_row(make_sampler, vocab_size):
    recorded = RECORDED[str(vocab_size)][:60]
    num_rows = len(RECORDED[str(vocab_size)])
    logits = peaked_logits(num_rows, vocab_size, vocab_size)[:60]
    rows = random_rows(num_rows, vocab_size, vocab_size)[:60]
    assert make_sampler(vocab_size).sample(logits, rows).ids == recorded


@pytest.mark.parametrize("vocab_size", [1, 2, 40, 255, 256, 257, 4099])
@pytest.mark.parametrize("seed", range(3))
def test_random_mixes_give_what_the_specification_gives(make_sampler, vocab_size, seed):
    rows = random_rows(80, vocab_size, seed)
    logits = peaked_logits(80, vocab_size, seed)
    # Some forbidden, some not numbers.
    logits[::5, vocab_size // 2 :] = -torch.inf
    logits[7, vocab_size // 3] = torch.nan
    found = make_sampler(vocab_size).sample(logits, rows)
    expected = Sampler(vocab_size, method=sample_each).sample(logits, rows)
    assert found.ids == expected.ids
    assert found.errors == expected.errors
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    for own, wanted in zip(found.alternatives, expected.alternatives, strict=True):
        assert (own is None) == (wanted is None)
        if own is not None and wanted is not None:
            assert own[0] == wanted[0]
            assert own[1] == pytest.approx(wanted[1], abs=1e-5)


@pytest.mark.parametrize("vocab_size", [40, 257, 4099])
def test_masked_rows_draw_what_their_masks_leave(make_sampler, vocab_size):
    """As if the others were minus infinity before anything else, in what is reported too."""
    rows, masks = random_rows(60, vocab_size, 9), random_masks(60, vocab_size, 9)
    logits = peaked_logits(60, vocab_size, 9)
    sampler, before = make_sampler(vocab_size), logits.clone()
    found = sampler.draw(logits, rows, masks).read()
    expected = sampler.sample(forbid(logits, masks), rows)
    assert torch.equal(logits, before)
    assert found == expected
    assert found.errors[59] == ALL_MASKED


@pytest.mark.parametrize("vocab_size", [300, 5003])
def test_a_batch_of_256_its_parts_and_each_row_alone_give_the_same_bits(make_sampler, vocab_size):
    rows, logits = mixed_rows(256), random_logits(256, vocab_size, seed=21)
    sampler = make_sampler(vocab_size)
    together = sampler.sample(logits, rows)
    for start in range(0, 256, 77):
        part = slice(start, start + 77)
        apart = sampler.sample(logits[part].clone(), rows[part])
        for index in range(len(apart.ids)):
            assert everything_of(apart, index) == everything_of(together, start + index)
    for index in range(0, 256, 5):
        alone = sampler.sample(logits[index : index + 1].clone(), rows[index : index + 1])
        assert everything_of(alone, 0) == everything_of(together, index)


def drawn_by_threads(sampler, logits, rows, numbers):
    """Return what is drawn with each number of threads."""
    threads = torch.get_num_threads()
    try:
        found = []
        for num_threads in numbers:
            torch.set_num_threads(num_threads)
            found.append(sampler.sample(logits, rows))
    finally:
        torch.set_num_threads(threads)
    return found


def test_the_number_of_threads_changes_no_bit(make_sampler):
    rows, logits = mixed_rows(40), random_logits(40, 9001, seed=22)
    found = drawn_by_threads(make_sampler(9001), logits, rows, (1, 2, 3))
    assert found[0] == found[1] == found[2]


def test_threads_of_the_kernel_share_nothing():
    """Long enough for them to be at it at the same time, also where there are few processors."""
    if reason := DrawKernel.probe():
        pytest.skip(reason)
    rows, logits = mixed_rows(32), random_logits(32, 49_999, seed=22)
    sampler = Sampler(49_999, method=DrawKernel())
    found = drawn_by_threads(sampler, logits, rows, (1, *(2, 3) * 10))
    assert all(each == found[0] for each in found)


def test_a_sampler_serves_inside_and_outside_of_inference_mode(make_sampler):
    rows, logits = mixed_rows(30), random_logits(30, 500, seed=29)
    sampler = make_sampler(500)
    with torch.inference_mode():
        inside = sampler.sample(logits, rows)
    assert sampler.sample(logits, rows) == inside


def test_equal_tokens_are_kept_alike(make_sampler):
    """Logits of 16-bit models have many equal values: ties decide where a limit lies."""
    logits = torch.round(random_logits(60, 700, seed=23, scale=1.5) * 2) / 2
    rows = [make_row(do_sample=True, seed=i, top_p=0.05 + i / 70, top_k=(i % 3) * 40)
            for i in range(60)]  # fmt: skip
    expected = Sampler(700, method=sample_each).sample(logits, rows)
    assert make_sampler(700).sample(logits, rows).ids == expected.ids


def test_limits_that_leave_one_token_or_all(make_sampler):
    limits = [{"top_p": 0.0}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"top_k": 10_000},
              {"top_p": 1 - 2**-53}, {"typical_p": 1e-9}, {"typical_p": 0.0}, {"min_p": 7.0}]  # fmt: skip
    for logits in (random_logits(1, 3000, seed=24), torch.zeros(1, 3000)):
        rows = [make_row(do_sample=True, seed=i, **each) for i, each in enumerate(limits)]
        expected = Sampler(3000, method=sample_each).sample(logits.expand(9, -1), rows)
        found = make_sampler(3000).sample(logits.expand(9, -1), rows)
        assert found.ids == expected.ids
        assert not found.errors


def test_ids_beyond_the_vocabulary_are_no_fault_of_penalties(make_sampler):
    """An input may have tokens that the head cannot produce."""
    logits = random_logits(2, 30, seed=25)
    rows = [make_row([35, 1, -1], [39, 2], do_sample=each, **PENALTIES) for each in (False, True)]
    known = [make_row([1, 1, 1], [2], do_sample=each, **PENALTIES) for each in (False, True)]
    found, expected = (make_sampler(30).sample(logits, each) for each in (rows, known))
    assert not found.errors
    assert found.ids[0] == expected.ids[0]


def test_sums_of_weights_depend_on_no_order():
    probs = torch.softmax(random_logits(1, 50_000, seed=26, scale=6.0)[0], dim=-1).numpy()
    weights = to_weights(probs)
    shuffled = np.random.default_rng(0).permutation(weights)
    assert weights.sum() == shuffled.sum() == sum(map(int, weights))
    # Exact for all that has a chance worth the name.
    is_normal = probs >= 2.0**-39
    assert (weights[is_normal] / 2.0**62 == probs[is_normal]).all()
    # The sum of a softmax may be more than 1.
    assert int(to_weights(np.full(4, 0.25 + 2e-5, dtype=np.float32)).sum()) > 2**62


class NotesOperations(TorchDispatchMode):
    """Notes what tensors are asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def warm_watermark(num_rows):
    """Return a watermark that remembers the lists of these rows: those are made on the host."""
    watermark = Watermark()
    sample_each(random_logits(num_rows, 400, seed=27), mixed_rows(num_rows), watermark)
    return watermark


# The kernel holds the softmax of 32 rows at once.
@pytest.mark.parametrize(
    ("name", "sizes"), [("kernel", (len(MIX), 32)), ("tensors", (2 * len(MIX), 4 * len(MIX)))]
)
def test_the_number_of_operations_does_not_grow_with_the_rows(name, sizes):
    if name == "kernel" and (reason := DrawKernel.probe()):
        pytest.skip(reason)
    watermark, noted = warm_watermark(max(sizes)), []
    for num_rows in sizes:
        rows, logits = mixed_rows(num_rows), random_logits(num_rows, 400, seed=27)
        method_of(name)(logits, rows, watermark)
        with NotesOperations() as operations:
            method_of(name)(logits, rows, watermark)
        noted.append(operations.names)
    assert noted[0] == noted[1]


def test_tensor_operations_read_their_results_once(monkeypatch):
    watermark, reads = warm_watermark(64), []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        own = getattr(torch.Tensor, name)

        def noting(self, *args, _own=own, _name=name, **kwargs):
            reads.append(_name)
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, noting)
    draws = draw_batch(random_logits(64, 400, seed=28), mixed_rows(64), watermark)
    assert reads == []
    draws.read()
    draws.read()
    assert reads == ["tolist"]


def test_without_a_compiler_rows_are_drawn_one_by_one_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(
        DrawKernel, "probe", classmethod(lambda cls: "no C++ compiler is installed")
    )
    with caplog.at_level(logging.WARNING):
        assert best_method(torch.device("cpu")) is sample_each
    assert "no C++ compiler is installed" in caplog.text
    assert best_method(torch.device("meta")) is draw_batch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_triton_fails_tensor_operations_draw_and_the_log_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert best_method(torch.device("cuda")) is draw_batch
    assert "tokens are drawn by tensor operations" in caplog.text
