"""The sampler: what transformers' processors give, row by row, and nothing from other rows."""

import json
import math

import numpy as np
import pytest
import torch
from tests.helpers.sampling import (
    BIAS,
    PENALTIES,
    SETTINGS,
    make_row,
    random_logits,
    reference_scores,
)

from lorax_contract.step import LogitBias
from lorax_shard.sampling.draws import uniforms
from lorax_shard.sampling.reference import distributions, draw_distance, top_alternatives
from lorax_shard.sampling.scores import adjusted
from lorax_shard.sampling.watermark import Watermark

CORNERS = [
    {"num_alternatives": 3},
    {"do_sample": False},
    {"do_sample": False, **PENALTIES},
    {"do_sample": False, "logit_bias": BIAS, "raw_logprobs": True, "num_alternatives": 2},
    {"banned": (7, 8), "temperature": 0.5, "raw_logprobs": True, "num_alternatives": 2},
]


@pytest.mark.parametrize("vocab_size", [50, 1003])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_are_those_of_transformers(settings, vocab_size):
    for seed in range(5):
        logits = random_logits(1, vocab_size, seed)
        row = make_row([1, 5, 5, 9], [5, 2, 2, 2, 11], do_sample=True, **settings)
        expected = torch.softmax(reference_scores(logits[0], row), dim=-1)
        (distribution,) = distributions(adjusted(logits, [row], [0], Watermark()), [row])
        kept = range(vocab_size) if distribution.ids is None else distribution.ids.tolist()
        assert list(kept) == torch.nonzero(expected).flatten().tolist()
        for token_id in kept:
            chance = distribution.probability(token_id)
            assert chance == pytest.approx(float(expected[token_id]), rel=1e-4, abs=1e-12)


def naive_draw(probs, numbers):
    """Descend level by level, summing each half anew."""
    low, high = 0, 1 << len(numbers)
    for level in range(len(numbers) - 1, -1, -1):
        middle = (low + high) // 2
        left, right = sum(probs[low:middle]), sum(probs[middle:high])
        if right and (not left or numbers[level] * (left + right) >= left):
            low = middle
        else:
            high = middle
    return low


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_drawn_token_and_logprob_follow_from_the_reference_softmax(make_sampler, settings):
    logits = random_logits(20, 301, seed=1)
    rows = [make_row([4, 2], [8, 8, 2], do_sample=True, seed=s, **settings) for s in range(20)]
    sampled = make_sampler(301).sample(logits, rows)
    for index, row in enumerate(rows):
        scores = reference_scores(logits[index], row)
        probs = torch.softmax(scores.double(), dim=-1).tolist()
        expected = naive_draw(probs, uniforms([row.params.seed], [5], 9)[0].tolist())
        assert sampled.ids[index] == expected
        logprob = float(torch.log_softmax(scores, dim=-1)[expected])
        assert sampled.logprobs[index] == pytest.approx(logprob, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, PENALTIES, {"logit_bias": BIAS}, {"watermark": True, **PENALTIES}, {"banned": (5, 40)}],
    ids=["plain", "penalised", "biased", "marked", "banned"],
)
def test_greedy_takes_the_best_adjusted_token(make_sampler, options):
    logits = random_logits(20, 301, seed=2)
    rows = [make_row([4, 2], [8, 8, 2, i], **options) for i in range(20)]
    sampled = make_sampler(301).sample(logits, rows)
    for index, row in enumerate(rows):
        scores = reference_scores(logits[index], row)
        assert sampled.ids[index] == int(scores.argmax())
        logprob = float(torch.log_softmax(scores, dim=-1).max())
        assert sampled.logprobs[index] == pytest.approx(logprob, abs=1e-5)


def test_penalties_decide_and_leave_the_logits_alone(make_sampler):
    logits = torch.tensor([[4.0, 3.0, -1.0, 0.0]] * 5)
    before = logits.clone()
    rows = [
        make_row([1], []),
        make_row([0], [], repetition_penalty=2.0),  # 4 / 2 < 3: the prompt counts
        make_row([0], [], frequency_penalty=2.0, presence_penalty=2.0),  # the prompt does not
        make_row([1], [0, 0], frequency_penalty=0.6),  # 4 - 2 * 0.6 < 3
        make_row([1], [0, 0], presence_penalty=0.6),  # 4 - 0.6 > 3
    ]
    assert make_sampler(4).sample(logits, rows).ids == [0, 1, 0, 1, 0]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_bias_of_100_forces_a_token_and_minus_100_bans_it(make_sampler, do_sample):
    logits = random_logits(40, 200, seed=11)
    best = logits.argmax(dim=-1).tolist()
    rows = [
        make_row(
            do_sample=do_sample,
            seed=i,
            logit_bias=LogitBias((best[i],), (-100.0,)) if i % 2 else LogitBias((i,), (100.0,)),
        )
        for i in range(40)
    ]
    ids = make_sampler(200).sample(logits, rows).ids
    assert ids[::2] == list(range(0, 40, 2))
    assert all(ids[i] != best[i] for i in range(1, 40, 2))


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_banned_token_is_never_drawn_whatever_its_bias(make_sampler, do_sample):
    logits = random_logits(30, 12, seed=12, scale=0.5)
    rows = [
        make_row(do_sample=do_sample, seed=i, banned=(3, 4), logit_bias=LogitBias((3, 5), (100, 1)))
        for i in range(30)
    ]
    sampled = make_sampler(12).sample(logits, rows)
    assert not sampled.errors
    assert not {3, 4} & set(sampled.ids)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.4, "top_k": 3}])
def test_raw_logprobs_are_the_models_own(make_sampler, options):
    """As vLLM reports them unless it is told otherwise: before bias, penalties and warpers."""
    logits = random_logits(12, 90, seed=13)
    rows = [
        make_row(
            [4, 2], [8, i], seed=i, raw_logprobs=True, num_alternatives=4, logit_bias=BIAS,
            **PENALTIES, **options,
        )
        for i in range(12)
    ]  # fmt: skip
    sampled = make_sampler(90).sample(logits, rows)
    own = torch.log_softmax(logits.double(), dim=-1)
    for i, token_id in enumerate(sampled.ids):
        assert sampled.logprobs[i] == pytest.approx(float(own[i, token_id]), abs=1e-5)
        expected = own[i].topk(4)
        ids, logprobs = sampled.alternatives[i]
        assert ids == expected.indices.tolist()
        assert logprobs == pytest.approx(expected.values.tolist(), abs=1e-5)
    # The tokens are what they are without.
    plain = [make_row([4, 2], [8, i], seed=i, logit_bias=BIAS, **PENALTIES, **options)
             for i in range(12)]  # fmt: skip
    assert make_sampler(90).sample(logits, plain).ids == sampled.ids


def test_greedy_ties_go_to_the_lowest_id(make_sampler):
    logits = torch.zeros(3, 70)
    logits[1, [30, 40, 69]] = 2.0
    logits[2, 69] = 1.0
    assert make_sampler(70).sample(logits, [make_row()] * 3).ids == [0, 30, 69]


def test_w26_temperature_zero_never_divides_whatever_the_others_have(make_sampler):
    logits = random_logits(4, 100, seed=3)
    rows = [
        make_row(do_sample=True, temperature=0.0),
        make_row(do_sample=True, temperature=0.7, seed=1),
        make_row(do_sample=False, temperature=0.0),
        make_row(do_sample=True, temperature=1e-60, seed=2),
    ]
    sampled = make_sampler(100).sample(logits, rows)
    assert not sampled.errors
    best = logits.argmax(dim=-1).tolist()
    assert [sampled.ids[i] for i in (0, 2, 3)] == [best[i] for i in (0, 2, 3)]
    assert sampled.logprobs[0] == pytest.approx(float(logits[0].log_softmax(-1).max()), abs=1e-5)
    assert all(math.isfinite(logprob) for logprob in sampled.logprobs)


@pytest.mark.parametrize("vocab_size", [64, 1009, 50_257])
def test_a_row_gets_bit_for_bit_the_same_alone_and_in_a_batch(make_sampler, vocab_size):
    num_rows = 32
    logits = random_logits(num_rows, vocab_size, seed=4)
    kinds = [*SETTINGS, *CORNERS]
    rows = [
        make_row([i, 1], [2, i], **{"do_sample": True, "seed": i, **kinds[i % len(kinds)]})
        for i in range(num_rows)
    ]
    sampler = make_sampler(vocab_size)
    together = sampler.sample(logits, rows)
    backwards = sampler.sample(logits.flip(0), rows[::-1])
    for i, row in enumerate(rows):
        alone = sampler.sample(logits[i : i + 1].clone(), [row])
        expected = (alone.ids[0], alone.logprobs[0], alone.alternatives[0])
        assert (together.ids[i], together.logprobs[i], together.alternatives[i]) == expected
        j = num_rows - 1 - i
        assert (backwards.ids[j], backwards.logprobs[j], backwards.alternatives[j]) == expected


def test_a_draw_depends_on_seed_and_position_only(make_sampler):
    logits = random_logits(1, 2000, seed=5, scale=0.1).expand(6, -1)
    rows = [
        make_row([1, 2, 3], [], do_sample=True, seed=11),
        make_row([9], [8, 7], do_sample=True, seed=11),
        make_row([1, 2, 3, 4], [], do_sample=True, seed=11),
        make_row([1, 2, 3], [], do_sample=True, seed=12),
        make_row([1, 2, 3], [], do_sample=True, seed=2**64 - 1),
        make_row([1, 2, 3], [], do_sample=True, seed=11 + 2**32),
    ]
    ids = make_sampler(2000).sample(logits, rows).ids
    assert ids[0] == ids[1]
    assert len({ids[0], *ids[2:]}) == 5


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [(math.nan, "finite"), (math.inf, "finite"), (-math.inf, "masked")],
)
def test_a_bad_row_fails_alone(make_sampler, bad, reason, do_sample):
    logits = random_logits(5, 100, seed=6)
    rows = [
        make_row(do_sample=do_sample, seed=i, top_p=0.9, top_k=9, num_alternatives=2)
        for i in range(5)
    ]
    healthy = make_sampler(100).sample(logits, rows)
    if bad == -math.inf:
        logits[2] = bad
    else:
        logits[2, 17] = bad
    sampled = make_sampler(100).sample(logits, rows)
    assert list(sampled.errors) == [2]
    assert reason in sampled.errors[2]
    assert sampled.ids[2] == -1
    assert sampled.alternatives[2] is None
    for i in (0, 1, 3, 4):
        assert sampled.ids[i] == healthy.ids[i]
        assert sampled.logprobs[i] == healthy.logprobs[i]
    json.dumps([sampled.logprobs], allow_nan=False)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_partly_masked_row_takes_a_token_that_is_left(make_sampler, do_sample):
    logits = torch.full((8, 600), -math.inf)
    logits[:, [3, 555]] = torch.tensor([0.0, 0.1])
    rows = [
        make_row(do_sample=do_sample, seed=i, num_alternatives=5, typical_p=0.999, top_p=0.99)
        for i in range(8)
    ]
    sampled = make_sampler(600).sample(logits, rows)
    assert not sampled.errors
    assert set(sampled.ids) <= {3, 555}
    for ids, logprobs in sampled.alternatives:
        assert ids == [555, 3]
        assert all(math.isfinite(logprob) for logprob in logprobs)


def test_columns_beyond_the_vocabulary_are_never_chosen(make_sampler):
    logits = random_logits(3, 40, seed=7)
    logits[:, 30:] = 100.0
    rows = [make_row(), make_row(do_sample=True), make_row([35, 1], [39], **PENALTIES)]
    narrow = make_sampler(30).sample(logits[:, :30].clone(), rows)
    wide = make_sampler(30).sample(logits, rows)
    assert wide.ids == narrow.ids
    assert wide.logprobs == narrow.logprobs


@pytest.mark.parametrize("shape", [(2, 30), (1, 29), (30,)])
def test_logits_of_a_wrong_shape_are_refused(make_sampler, shape):
    with pytest.raises(ValueError, match="expected 1 rows of at least 30 values"):
        make_sampler(30).sample(torch.zeros(shape), [make_row()])


def test_alternatives_are_the_likeliest_tokens_of_the_scores_that_were_drawn_from(make_sampler):
    logits = random_logits(2, 500, seed=8)
    rows = [
        make_row(num_alternatives=4),
        make_row(do_sample=True, temperature=0.5, top_k=3, num_alternatives=4),
    ]
    sampled = make_sampler(500).sample(logits, rows)
    for i, (row, count) in enumerate(zip(rows, (4, 3), strict=True)):
        expected = torch.log_softmax(reference_scores(logits[i], row), dim=-1).topk(count)
        ids, logprobs = sampled.alternatives[i]
        assert ids == expected.indices.tolist()
        assert logprobs == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert sampled.alternatives[0][0][0] == sampled.ids[0]
    assert sampled.alternatives[0][1][0] == sampled.logprobs[0]


def test_top_alternatives_orders_ties_by_id():
    logprobs = torch.log_softmax(torch.tensor([0.0, 2.0, 1.0, 2.0, -math.inf]), dim=-1)
    ids, values = top_alternatives(logprobs, 10)
    assert ids == [1, 3, 2, 0]
    assert values == sorted(values, reverse=True)
    assert top_alternatives(logprobs, 0) == ([], [])


def test_draw_distance_tells_a_near_miss_from_a_wrong_token(make_sampler):
    logits = random_logits(1, 50, seed=10)[0]
    row = make_row(do_sample=True, seed=3, top_k=20)
    chosen = make_sampler(50).sample(logits.unsqueeze(0), [row]).ids[0]

    def compare(token_id):
        return draw_distance(logits, row.params, row.token_ids, token_id, row.num_prompt_tokens)

    (distribution,) = distributions(logits.unsqueeze(0), [row])
    for token_id in distribution.ids.tolist():
        distance, probability = compare(token_id)
        assert probability == distribution.probability(token_id)
        assert (distance == 0.0) == (token_id == chosen)
        assert distance < 1.0
    assert compare(int(logits.argmin())) == (math.inf, 0.0)
    with pytest.raises(ValueError, match="rows that sample"):
        draw_distance(logits, make_row().params, row.token_ids, chosen, 3)


def test_draw_distance_knows_a_bias(make_sampler):
    logits = random_logits(1, 50, seed=15, scale=0.5)[0]
    row = make_row(do_sample=True, seed=5, logit_bias=LogitBias((9, 3), (4.0, -100.0)))
    chosen = make_sampler(50).sample(logits.unsqueeze(0), [row]).ids[0]
    found = [draw_distance(logits, row.params, row.token_ids, i, 3) for i in (chosen, 3)]
    assert found[0].distance == 0.0
    assert found[1].probability < 1e-30


def test_draw_distance_knows_penalties_of_the_output_only():
    logits = random_logits(1, 50, seed=14, scale=0.5)[0]
    ids = np.array([7, 7, 9, 9], dtype=np.int64)
    params = make_row(do_sample=True, frequency_penalty=1.5).params
    of_prompt = draw_distance(logits, params, ids, 7, 2).probability
    of_output = draw_distance(logits, params, ids, 9, 2).probability
    all_prompt = [
        draw_distance(logits, params, ids, token_id, 4).probability for token_id in (7, 9)
    ]
    assert of_prompt > all_prompt[0]
    assert of_output < all_prompt[1] * 0.1
