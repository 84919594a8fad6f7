"""LoRAX's rules for sampling options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from lorax_contract.errors import ValidationError
from lorax_contract.step import UNSAMPLED, OutputKind
from lorax_router.service.limits import RequestLimits
from lorax_router.service.requests import GenerateParameters
from lorax_router.service.sampling import resolve_sampling

LIMITS = RequestLimits(max_input_length=20, max_total_tokens=30, vocab_size=50, max_best_of=3)


def resolve(limits: RequestLimits = LIMITS, **params: Any):
    seeds = itertools.count(7)
    return resolve_sampling(GenerateParameters(**params), limits, lambda: next(seeds))


@pytest.mark.parametrize(
    ("params", "sampled"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.5}, True),
        ({"temperature": 0.0}, False),
        ({"temperature": 0.0, "do_sample": True}, False),
        ({"temperature": 0.0, "top_k": 5}, False),
        ({"temperature": 1e-6, "do_sample": True}, False),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"top_p": 1.0}, False),
        ({"typical_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"min_p": 0.0}, False),
        ({"repetition_penalty": 1.5}, False),
        ({"best_of": 2, "temperature": 1.0}, True),
    ],
)
def test_whether_tokens_are_drawn(params, sampled):
    assert all(each.do_sample is sampled for each in resolve(**params))


def test_vectors_and_labels_have_no_sampling_unless_some_is_asked_for():
    (found,) = resolve(output=OutputKind.SCORES)
    assert found is UNSAMPLED
    assert resolve(output=OutputKind.VECTOR, seed=3)[0].seed == 3
    with pytest.raises(ValidationError):
        resolve(output=OutputKind.VECTOR, temperature=-1.0)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"best_of": -1}, "best_of"),
        ({"best_of": 4, "do_sample": True}, "from 1 to 3"),
        ({"best_of": 2}, "needs sampling"),
        ({"best_of": 2, "temperature": 0.0}, "needs sampling"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e39}, "temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        # Above 0, and yet a logit divided by it is infinite.
        ({"repetition_penalty": 1e-45}, "repetition_penalty"),
        ({"repetition_penalty": 1e-38}, "at least 1e-30, got 1e-38"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -3}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": 1e-50}, "top_p"),
        ({"typical_p": 0.0}, "typical_p"),
        ({"typical_p": 1.0}, "typical_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"return_k_alternatives": 0}, "return_k_alternatives"),
        ({"return_k_alternatives": 257}, "return_k_alternatives"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(params, named):
    with pytest.raises(ValidationError, match=named):
        resolve(**params)


def test_a_server_with_one_sequence_says_so():
    limits = RequestLimits(max_input_length=20, max_total_tokens=30, vocab_size=50, max_best_of=1)
    with pytest.raises(ValidationError, match="not allowed on this server"):
        resolve(limits, best_of=2, do_sample=True)
    assert len(resolve(limits, best_of=1)) == 1


def test_bounds_themselves_are_accepted():
    (one,) = resolve(
        frequency_penalty=-2.0, presence_penalty=2.0, top_p=1.0, min_p=1.0, seed=2**64 - 1
    )
    assert (one.frequency_penalty, one.presence_penalty, one.top_p) == (-2.0, 2.0, 1.0)
    assert (one.min_p, one.seed) == (1.0, 2**64 - 1)


def test_each_sequence_gets_a_seed_of_its_own():
    assert [each.seed for each in resolve(best_of=3, do_sample=True)] == [7, 8, 9]


def test_a_given_seed_is_kept_and_none_is_drawn():
    assert resolve(seed=5, do_sample=True)[0].seed == 5


def test_alternatives_never_exceed_the_vocabulary():
    assert resolve(return_k_alternatives=200)[0].num_alternatives == 50
    assert resolve(return_k_alternatives=3)[0].num_alternatives == 3


def test_no_sequence_means_one_as_in_lorax():
    assert len(resolve(best_of=0)) == 1


def test_a_penalised_logit_stays_a_number():
    (least,) = resolve(repetition_penalty=1e-30)
    assert 1e4 / least.repetition_penalty < 3.4e38
    assert resolve(top_k=2**31 - 1)[0].top_k == 2**31 - 1


def test_numbers_are_what_shards_compute_with():
    assert resolve(top_p=0.9)[0].top_p == pytest.approx(0.9, rel=1e-6)
    assert resolve(top_p=0.9)[0].top_p != 0.9  # 32 bits
