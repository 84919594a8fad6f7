"""Attention of encoders: rows of any lengths, each over itself alone, near or all of it."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorax_shard.attention.backend import AttentionSpec, RelativeBias
from lorax_shard.attention.ragged import RaggedAttention, RaggedTileAttention, encoder_attention
from lorax_shard.attention.whole import WholeAttention, split_rows

CPU = torch.device("cpu")
HEADS, KV_HEADS = 4, 2


def metadata(lens: list[int]) -> Any:
    return SimpleNamespace(
        query_lens=lens, scratch={}, slots=torch.zeros(sum(lens), dtype=torch.long)
    )


def alone(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    scaling: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the scores of one row out, head by head."""
    at = torch.arange(len(q))
    far = (at[:, None] - at).abs() >= (math.inf if window is None else window)
    heads = []
    for head in range(HEADS):
        of = head // (HEADS // KV_HEADS)
        scores = scaling * q[:, head] @ k[:, of].T
        if bias is not None:
            scores = scores + bias[head]
        scores = scores.masked_fill(far, -math.inf)
        heads.append(scores.softmax(dim=-1) @ v[:, of])
    return torch.stack(heads, dim=1)


@pytest.fixture(params=[WholeAttention, RaggedAttention, RaggedTileAttention])
def backend(request: pytest.FixtureRequest) -> WholeAttention:
    if reason := request.param.probe(CPU, torch.float32):
        pytest.skip(reason)
    return request.param()


def drawn(lens: list[int], dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V as columns of one tensor, as stacked linears give them."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    generator = torch.Generator().manual_seed(seed)
    stacked = torch.randn(sum(lens), sum(heads) * dim, generator=generator)
    q, k, v = (
        part.view(len(part), -1, dim)
        for part in torch.split(stacked, [number * dim for number in heads], dim=-1)
    )
    return q, k, v


@pytest.mark.parametrize("window", [None, 1, 4, 64])
@pytest.mark.parametrize("dim", [8, 16, 20, 32, 64, 128])
@pytest.mark.parametrize("seed", range(4))
def test_each_row_sees_itself_alone(
    backend: WholeAttention, window: int | None, dim: int, seed: int
) -> None:
    draw = random.Random(seed)
    some = [1, 2, 3, 3, 9, 17, 33, 40, 41, 64, 65, 150]
    lens = [draw.choice(some) for _ in range(draw.randint(1, 20))]
    q, k, v = drawn(lens, dim, seed)
    spec = AttentionSpec(scaling=0.3, window=window)
    found = backend.attend(q, k, v, 0, spec, metadata(lens))
    rows = zip(*(torch.split(each, lens) for each in (q, k, v)), strict=True)
    wanted = torch.cat([alone(*row, window, 0.3) for row in rows])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def biases(num_tokens: int, longest: int) -> list[RelativeBias]:
    """By distance, with and without what tokens themselves add: of more distances than rows have, too."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    wide, width = 2 * draw(HEADS, 2 * longest + 3), 5
    places = torch.randint(width, (2 * longest - 1,), generator=generator).int()
    # Parts of other tensors, as models may give them.
    of_query, of_key = draw(2, num_tokens, HEADS, width).transpose(1, 2)
    return [
        RelativeBias(wide[:, 2:-2]),
        RelativeBias(wide),
        RelativeBias(None, places, of_query),
        RelativeBias(None, places, None, of_key),
        RelativeBias(wide[:, 2:-2], places, of_query, of_key),
    ]


def whole_bias(bias: RelativeBias, start: int, length: int) -> torch.Tensor:  # H x length x length
    """Write out what is added to each score of a row that begins with token ``start``."""
    at = torch.arange(length)
    found = torch.zeros(HEADS, length, length)
    if bias.by_distance is not None:
        found += bias.by_distance[:, bias.by_distance.shape[1] // 2 + at - at[:, None]]
    if bias.places is not None:
        places = bias.places[len(bias.places) // 2 + at - at[:, None]].long()
        if bias.of_query is not None:
            found += bias.of_query[:, start + at[:, None], places]
        if bias.of_key is not None:
            found += bias.of_key[:, start + at, places]
    return found


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dim", [20, 32])
@pytest.mark.parametrize(
    "lens", [[1], [9, 9, 9], [40, 3, 64, 1, 65], [150, 20, 17], [1100, 7, 600]]
)
def test_a_bias_is_that_of_the_distance(
    backend: WholeAttention, lens: list[int], dim: int, window: int | None
) -> None:
    q, k, v = drawn(lens, dim, 1)
    step = metadata(lens)
    starts = [sum(lens[:row]) for row in range(len(lens))]
    for bias in (*biases(sum(lens), max(lens)), None):
        added = [
            None if bias is None else whole_bias(bias, *row)
            for row in zip(starts, lens, strict=True)
        ]
        rows = zip(*(torch.split(each, lens) for each in (q, k, v)), added, strict=True)
        wanted = torch.cat([alone(*row, window, 0.3, own) for *row, own in rows])
        found = backend.attend(q, k, v, 0, AttentionSpec(0.3, window, bias=bias), step)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_row_longer_than_a_span(backend: WholeAttention) -> None:
    lens = [7, 1100, 600]
    q, k, v = drawn(lens, 32, 0)
    for window in (None, 70, 700):
        found = backend.attend(q, k, v, 0, AttentionSpec(0.2, window), metadata(lens))
        rows = zip(*(torch.split(each, lens) for each in (q, k, v)), strict=True)
        wanted = torch.cat([alone(*row, window, 0.2) for row in rows])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_what_is_no_number_stays_in_its_row(backend: WholeAttention) -> None:
    lens = [40, 20, 70, 3]
    q, k, v = drawn(lens, 32, 0)
    spec = AttentionSpec(0.2)
    clean = backend.attend(q, k, v, 0, spec, metadata(lens)).split(lens)
    for each in (k, v):
        each[lens[0] + 5] = math.nan
        each[sum(lens[:2]) + 69] = math.inf
    found = backend.attend(q, k, v, 0, spec, metadata(lens)).split(lens)
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[3], clean[3])
    assert not found[1].isfinite().any()


def test_what_does_not_fit_is_refused() -> None:
    backend = encoder_attention(CPU, torch.float32)
    if not isinstance(backend, RaggedAttention):
        pytest.skip("no kernel is there")
    q, k, v = drawn([3, 4], 8, 0)
    for lens, key in (([3, 5], k), ([3, 4], k[:6]), ([3, 4], k.double()), ([3, 4], k[..., :4])):
        with pytest.raises(ValueError, match="do not fit"):
            backend.attend(q, key, v, 0, AttentionSpec(0.2), metadata(lens))


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_split_into_few_groups_that_fill_up_little(seed: int) -> None:
    draw = random.Random(seed)
    lens = [draw.randint(1, 500) for _ in range(draw.randint(1, 60))]
    groups = split_rows(lens)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lens)))
    for rows in groups:
        own = sum(lens[row] ** 2 for row in rows)
        assert len(rows) * max(lens[row] for row in rows) ** 2 <= 1.5 * own + 8192
    assert len(groups) <= 12
