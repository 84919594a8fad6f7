"""Rows of several vocabularies in one step: each gets the bits that it would get alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorax_contract.step import (
    AdapterHandle,
    LogitBias,
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
)
from lorax_shard.engine.active_adapters import ActiveAdapter
from lorax_shard.engine.prompt_scores import prompt_scores
from lorax_shard.engine.row_draws import draw_rows, scores_of
from lorax_shard.engine.rows import Row, make_row
from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.sampler import Sampler
from lorax_shard.sampling.watermark import Watermark

BASE, WIDER, WIDEST = 384, 390, 423
SAMPLING = [
    {},
    {"do_sample": True, "seed": 3, "temperature": 1.4},
    {"do_sample": True, "seed": 4, "top_p": 0.7, "top_k": 40},
    {"do_sample": True, "seed": 5, "typical_p": 0.6, "num_alternatives": 4},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "num_alternatives": 3},
    {"watermark": True, "logit_bias": LogitBias((7, 380), (5.0, -100.0))},
    {"logit_bias": LogitBias((7, 12), (9.0, 1.0)), "raw_logprobs": True, "num_alternatives": 2},
]


def make(number: int, vocab_size: int = BASE) -> Row:
    """Return a row that ends with its adapter's last token, if it has one."""
    spec = RequestSpec(
        request_id=RequestId(number + 1),
        prompt_ids=[5, 9, 5, vocab_size - 1],
        sampling=SamplingParams(**SAMPLING[number % len(SAMPLING)]),
        stopping=StoppingParams(max_new_tokens=8),
    )
    row = make_row(NewRow(spec, []), vocab_size=vocab_size)
    if vocab_size != BASE:
        row.adapter = ActiveAdapter(AdapterHandle(number), number, vocab_size, frozenset())
    return row


def logits_of(rows: list[Row], width: int) -> torch.Tensor:
    """Return logits in which no row has tokens beyond its own vocabulary."""
    logits = torch.full((len(rows), width), float("-inf"))
    for index, row in enumerate(rows):
        size = row.adapter.vocab_size if row.adapter else BASE
        generator = torch.Generator().manual_seed(int(row.request_id))
        logits[index, :size] = torch.randn(size, generator=generator) * 2
    return logits


@pytest.mark.parametrize("others", [(), (WIDER,), (WIDEST, WIDER, WIDEST)])
def test_a_draw_depends_on_no_neighbour(others: tuple[int, ...]) -> None:
    watermark = Watermark(0.25, 5.0)
    sampler = Sampler(BASE, watermark=watermark)
    base = [make(number) for number in range(len(SAMPLING))]
    rows = [make(10 + at, size) for at, size in enumerate(others)]
    mixed = [*base[:2], *rows, *base[2:]]
    width = max([BASE, *others])
    got = draw_rows(sampler, logits_of(mixed, width), mixed).read()
    for index, row in enumerate(mixed):
        size = row.adapter.vocab_size if row.adapter else BASE
        alone = Sampler(size, watermark=watermark).sample(logits_of([row], size), [row])
        assert got.ids[index] == alone.ids[0]
        assert got.logprobs[index] == alone.logprobs[0]
        assert got.alternatives[index] == alone.alternatives[0]
    assert not got.errors


def test_a_row_may_draw_a_token_that_only_its_adapter_has() -> None:
    rows = [make(0), make(5, WIDER)]
    logits = logits_of(rows, WIDEST)
    logits[1, WIDER - 1] = 50.0
    logits[0, 7] = 50.0
    assert draw_rows(Sampler(BASE), logits, rows).read().ids == [7, WIDER - 1]


def test_a_row_without_numbers_fails_alone() -> None:
    rows = [make(0), make(5, WIDER), make(1), make(10, WIDER)]
    logits = logits_of(rows, WIDER)
    logits[1] = float("nan")
    got = draw_rows(Sampler(BASE), logits, rows).read()
    assert list(got.errors) == [1]
    alone = Sampler(BASE).sample(logits_of(rows[:1], BASE), rows[:1])
    assert got.ids[0] == alone.ids[0]


def test_rows_of_several_vocabularies_wait_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ids stay where they are drawn until somebody reads them, and each may fail."""
    waits = []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "nonzero"):
        own = getattr(torch.Tensor, name)

        def noting(self, *args, _own=own, _name=name, **kwargs):
            waits.append(_name)
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, noting)
    rows = [make(0), make(9, WIDER), make(1), make(10, WIDEST), make(4)]
    logits = logits_of(rows, WIDEST)
    draws = draw_rows(Sampler(BASE, method=draw_batch), logits, rows)
    draws.fail(3, "its constraint broke")
    assert not waits
    tokens = draws.read()
    assert draws.on_device is not None
    assert draws.on_device.tolist() == tokens.ids
    assert tokens.errors == {3: "its constraint broke"}
    for index in (0, 1, 2, 4):
        assert tokens.ids[index] == draw_rows(Sampler(BASE), logits, rows).read().ids[index]


@pytest.mark.parametrize("size", [BASE, WIDER])
def test_logprobs_of_a_prompt_have_the_bits_of_its_own_vocabulary(size: int) -> None:
    row = make(0, size)
    targets = np.array([3, 7, size - 1, 0])
    own = torch.randn(4, size, generator=torch.Generator().manual_seed(1)) * 3
    wide = torch.full((4, WIDEST), float("-inf"))
    wide[:, :size] = own
    alone = prompt_scores(own, targets.tolist())
    assert scores_of(Sampler(BASE), wide, row, targets) == alone
