"""Workloads by their formulas: lengths, laws of adapters, arrivals, and what differs by round."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from lorax_bench.arrivals import gamma_arrivals, poisson_arrivals
from lorax_bench.popularity import LAWS, choose, probabilities
from lorax_bench.workloads import KINDS, LoadOptions, build, effective, parse_spec


def test_w1_has_the_published_lengths() -> None:
    load = build("w1")
    random.seed(0)
    prompts = [
        [random.randint(100, 40000) for _ in range(random.randint(16, 128))] for _ in range(32)
    ]
    lengths = [random.choice([16, 32, 64, 96]) for _ in range(32)]
    assert [len(each.prompt_ids) for each in load.requests] == [len(each) for each in prompts]
    assert [each.max_tokens for each in load.requests] == lengths
    assert (load.num_prompt_tokens, load.num_output_tokens) == (2471, 1520)
    assert {each.at_s for each in load.requests} == {0.0}
    assert load.concurrency is None


@pytest.mark.parametrize("name", KINDS)
def test_a_round_has_ids_of_its_own_and_all_else_of_the_others(name: str) -> None:
    options = LoadOptions(adapters=3, rate=5.0, temperature=0.7)
    one, again, other = (build(name, options=options, number=number) for number in (1, 1, 2))
    assert one == again
    alike = [
        [(len(r.prompt_ids), r.max_tokens, r.adapter, r.at_s, r.seed) for r in load.requests]
        for load in (one, other)
    ]
    assert alike[0] == alike[1]
    assert not {r.prompt_ids[:8] for r in one.requests} & {r.prompt_ids[:8] for r in other.requests}


@pytest.mark.parametrize("name", KINDS)
def test_another_seed_has_other_ids(name: str) -> None:
    assert build(name, seed=1).requests[0].prompt_ids != build(name, seed=2).requests[0].prompt_ids


def test_no_id_is_above_the_vocabulary() -> None:
    ids = {i for each in build("w1", last_id=300).requests for i in each.prompt_ids}
    assert (min(ids), max(ids)) == (100, 300)


@pytest.mark.parametrize(
    ("name", "prompts", "answers"),
    [("long-prompts", (512, 2048), (16, 32)), ("long-answers", (16, 64), (256, 512))],
)
def test_long_ones_stay_within_their_bounds(
    name: str, prompts: tuple[int, int], answers: tuple[int, int]
) -> None:
    load = build(f"{name},requests=200")
    lengths = [len(each.prompt_ids) for each in load.requests]
    outputs = [each.max_tokens for each in load.requests]
    assert prompts[0] <= min(lengths) < max(lengths) <= prompts[1]
    assert answers[0] <= min(outputs) < max(outputs) <= answers[1]


def test_turns_of_a_chat_begin_with_all_that_was_before() -> None:
    load = build("chat,conversations=3,turns=4,system=50")
    prompts = [each.prompt_ids for each in load.requests]
    assert len({prompt[:50] for prompt in prompts}) == 1
    for number, prompt in enumerate(prompts[3:], start=3):
        earlier = prompts[number - 3]
        assert prompt[: len(earlier)] == earlier
        assert len(prompt) > len(earlier) + load.requests[number - 3].max_tokens
    # One at a time of each conversation.
    assert load.concurrency == 3


def test_a_long_prompt_comes_among_streams_that_run() -> None:
    *streams, last = build("interruption,long=900,after=5").requests
    assert {(len(each.prompt_ids), each.max_tokens, each.at_s) for each in streams} == {
        (32, 160, 0)
    }
    assert (len(streams), len(last.prompt_ids), last.at_s) == (8, 900, 5.0)


def test_a_fan_out_asks_every_adapter_for_each_prompt() -> None:
    load = build("fan-out,prompts=2,ways=5,prompt=20,output=1")
    for each in (load.requests[:5], load.requests[5:]):
        assert len({request.prompt_ids for request in each}) == 1
        assert [request.adapter for request in each] == list(range(5))
    assert load.requests[0].prompt_ids != load.requests[5].prompt_ids


def test_slora_has_gamma_arrivals_and_many_adapters() -> None:
    load = build("slora,requests=2000")
    times = [each.at_s for each in load.requests]
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(2.0, rel=0.1)
    assert load.num_adapters == 100
    assert effective("slora", LoadOptions(cv=3.0)).rate == 2.0


def test_sampled_requests_have_a_seed_each_and_greedy_ones_none() -> None:
    sampled = build("w1", options=LoadOptions(temperature=0.8, top_p=0.9)).requests
    assert len({each.seed for each in sampled}) == len(sampled)
    assert {(each.temperature, each.top_p) for each in sampled} == {(0.8, 0.9)}
    assert {each.seed for each in build("w1").requests} == {None}


def test_what_is_asked_for_beats_what_a_workload_has() -> None:
    assert build("fan-out", options=LoadOptions(adapters=0)).num_adapters == 0
    assert build("chat", options=LoadOptions(concurrency=2)).concurrency == 2
    opened = build("chat", options=LoadOptions(rate=4.0))
    assert opened.concurrency is None
    assert opened.requests[-1].at_s > 0
    closed = build("slora", options=LoadOptions(concurrency=4))
    assert {each.at_s for each in closed.requests} == {0.0}


def test_a_spec_gives_the_values_of_a_shape() -> None:
    assert parse_spec("mixed,prompt=3-9,requests=7") == (
        "mixed", {"requests": 7, "prompt": (3, 9), "output": (8, 160)},
    )  # fmt: skip
    assert parse_spec("mixed,prompt=5")[1]["prompt"] == (5, 5)


@pytest.mark.parametrize(
    "spec",
    ["w2", "w1,prompt=3", "mixed,prompt=9-3", "mixed,prompt=x", "fixed,prompt=3-9", "mixed,"],
)
def test_a_spec_that_says_nothing_sensible_is_refused(spec: str) -> None:
    with pytest.raises(ValueError):
        parse_spec(spec)


@pytest.mark.parametrize("law", LAWS)
def test_requests_follow_the_shares_of_their_law(law: str) -> None:
    num, requests = 10, 40_000
    shares = probabilities(law, num, 1.3)
    counts = Counter(choose(law, num, requests, np.random.default_rng(3), 1.3))
    assert shares.sum() == pytest.approx(1.0)
    for adapter, share in enumerate(shares):
        # Five standard deviations of a binomial law.
        near = 5 * (share * (1 - share) / requests) ** 0.5
        assert counts[adapter] / requests == pytest.approx(share, abs=near)


def test_shares_are_those_of_the_formulas() -> None:
    assert probabilities("uniform", 4).tolist() == [0.25] * 4
    assert probabilities("zipf", 3, 1.0).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert probabilities("power", 4, 0.5).tolist() == pytest.approx(
        [0.5, 0.5**0.5 - 0.5, 0.75**0.5 - 0.5**0.5, 1 - 0.75**0.5]
    )
    assert probabilities("power", 4, 1.0).tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("law", "num", "alpha"), [("pareto", 3, 1.0), ("zipf", 0, 1.0), ("zipf", 3, 0.0)]
)
def test_a_law_that_cannot_be_is_refused(law: str, num: int, alpha: float) -> None:
    with pytest.raises(ValueError):
        probabilities(law, num, alpha)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 4.0])
def test_intervals_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    times = gamma_arrivals(2.5, cv, 100_000, np.random.default_rng(7))
    intervals = np.diff(times)
    assert intervals.min() >= 0
    assert intervals.mean() == pytest.approx(1 / 2.5, rel=0.05)
    assert intervals.std() / intervals.mean() == pytest.approx(cv, abs=0.05 * max(cv, 1))


def test_poisson_counts_vary_as_much_as_they_come() -> None:
    times = np.asarray(poisson_arrivals(5.0, 50_000, np.random.default_rng(1)))
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(5.0, rel=0.05)
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)


@pytest.mark.parametrize(("rate", "cv"), [(0.0, 1.0), (1.0, -1.0)])
def test_arrivals_that_cannot_be_are_refused(rate: float, cv: float) -> None:
    with pytest.raises(ValueError):
        gamma_arrivals(rate, cv, 3, np.random.default_rng(0))
