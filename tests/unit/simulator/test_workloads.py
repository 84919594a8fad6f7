"""Workloads against what their definitions give by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from lorax_router.simulator.trace import Trace, trace_of_clients
from lorax_router.simulator.workloads.catalog import make_workload
from lorax_router.simulator.workloads.punica import popularity
from lorax_router.simulator.workloads.vtc import SUITES


def of_client(trace: Trace, client: int) -> np.ndarray:
    return trace.times[trace.clients == client]


# --- S-LoRA ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "alpha", "share"),
    [(200, 0.1, 0.589), (200, 0.3, 0.204), (200, 0.6, 0.042), (200, 1.0, 0.005),
     (32, 0.1, 0.707), (32, 0.3, 0.354), (32, 0.6, 0.125), (32, 1.0, 0.031)],
)  # fmt: skip
def test_slora_gives_its_first_adapter_the_share_that_the_law_says(
    n: int, alpha: float, share: float
) -> None:
    trace = make_workload(f"slora:s1,n={n},alpha={alpha},rate=2000,duration=100")
    assert np.mean(trace.adapters == 1) == pytest.approx(share, abs=0.003)


def test_slora_draws_in_the_published_order() -> None:
    trace = make_workload("slora:s2,n=4,rate=2,duration=3")
    rng = np.random.RandomState(42)
    adapters = (4 * rng.power(1.0, 6)).astype(int)
    assert (trace.adapters - 1).tolist() == adapters.tolist()
    assert trace.prompts.tolist() == rng.randint(8, 512, 6).tolist()
    assert trace.outputs.tolist() == rng.randint(8, 512, 6).tolist()
    assert trace.times.tolist() == np.cumsum(rng.gamma(1.0, 0.5, 6)).tolist()
    assert trace.adapter_ranks == (0, 64, 32, 16, 8)


def test_slora_bursts_have_the_variation_that_is_asked_for() -> None:
    for cv in (1, 4):
        trace = make_workload(f"slora:s1,cv={cv},rate=100,duration=1000")
        gaps = np.diff(trace.times)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
        assert 1 / gaps.mean() == pytest.approx(100, rel=0.05)


def test_slora_without_adapters_asks_for_the_base_model() -> None:
    assert set(make_workload("slora:s4,n=0").adapters.tolist()) == {0}


# --- VTC ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "counts"),
    [
        ("overload", [540, 1080]),
        ("overload-multi", [144] * 3 + [216] * 5),
        ("overload-weighted", [288, 288, 432, 576]),
        ("proportional", [150, 300, 900]),
        ("increase", [300, 660]),
    ],
)
def test_vtc_suites_have_rate_times_duration_requests(suite: str, counts: list[int]) -> None:
    trace = make_workload(f"vtc:{suite}")
    assert np.bincount(trace.clients).tolist() == counts
    assert set(trace.prompts.tolist()) == set(trace.outputs.tolist()) == {256}


def test_vtc_requests_are_evenly_spaced() -> None:
    trace = make_workload("vtc:overload")
    for client, rate in enumerate((1.5, 3.0)):
        times = of_client(trace, client)
        assert np.allclose(np.diff(times), 1 / rate)
        assert 1 / rate <= times[0] < 2 / rate


def test_vtc_client_that_goes_on_and_off_is_silent_every_other_minute() -> None:
    for suite, rate in (("on_off_less", 0.5), ("on_off_overload", 2.0)):
        trace = make_workload(f"vtc:{suite}")
        minutes = np.bincount((of_client(trace, 0) // 60).astype(int), minlength=10)
        assert set(minutes[1::2].tolist()) == {0}
        assert set(minutes[2:10:2].tolist()) <= {int(60 * rate), int(60 * rate) + 1}


def test_vtc_rate_increases_from_two_tenths_to_two() -> None:
    times = of_client(make_workload("vtc:increase"), 1)
    assert times[0] == pytest.approx(1 / 0.2)
    assert times[1] - times[0] == pytest.approx(1 / (0.2 + 1.8 * 5 / 600))
    assert 1 / (times[-1] - times[-2]) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(
    ("suite", "lengths"),
    [("poisson_short_long", [(64, 64), (256, 256)]), ("short_long_2", [(512, 32), (32, 512)])],
)
def test_vtc_short_and_long_requests_come_at_random(
    suite: str, lengths: list[tuple[int, int]]
) -> None:
    trace = make_workload(f"vtc:{suite}")
    assert len(trace) == int(9.5 * 600)
    assert np.mean(trace.clients == 0) == pytest.approx(8 / 9.5, abs=0.02)
    gaps = np.diff(trace.times)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)
    for client, length in enumerate(lengths):
        mine = trace.clients == client
        assert set(zip(trace.prompts[mine].tolist(), trace.outputs[mine].tolist())) == {length}


def test_vtc_distribution_shifts_by_thirds() -> None:
    trace = make_workload("vtc:dist_shift")
    counts = [
        np.bincount((of_client(trace, client) // 300).astype(int), minlength=3)[:3]
        for client in (0, 1)
    ]
    assert counts[0].tolist() == pytest.approx([90, 300, 150], abs=3)
    assert counts[1].tolist() == pytest.approx([600, 300, 450], abs=3)


def test_vtc_real_has_the_published_statistics() -> None:
    trace = make_workload("vtc:real")
    counts = sorted(np.bincount(trace.clients).tolist(), reverse=True)
    assert (len(trace), counts[:4], counts[-3:]) == (1500, [296, 262, 199, 120], [2, 2, 1])
    assert np.median(trace.prompts) == pytest.approx(40, rel=0.15)
    assert trace.prompts.mean() == pytest.approx(136, rel=0.15)
    assert np.median(trace.outputs) == pytest.approx(211, rel=0.1)
    assert trace.outputs.mean() == pytest.approx(256, rel=0.1)
    assert trace.times[-1] == pytest.approx(600, rel=0.1)


def test_vtc_clients_may_be_adapters_of_one_tenant() -> None:
    tenants = make_workload("vtc:overload")
    adapters = make_workload("vtc:overload,clients=adapters")
    assert (len(tenants.tenant_names), len(adapters.tenant_names)) == (2, 1)
    assert adapters.adapters.tolist() == tenants.adapters.tolist()
    assert [adapters.client_names[i] for i in set(adapters.clients.tolist())] == [
        "adapter-0", "adapter-1",
    ]  # fmt: skip


def test_every_vtc_suite_can_be_cut_short() -> None:
    for suite in SUITES:
        trace = make_workload(f"vtc:{suite},minutes=1")
        assert 0 < trace.times[-1] < 60


# --- Punica ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "counts"),
    [
        ("identical", [32]),
        ("distinct", [1] * 32),
        ("uniform", [6, 6, 5, 5, 5, 5]),
        # 1, 1.5, 2.25, ... rounded down while they fit, and what is left.
        ("skewed", [11, 7, 5, 3, 2, 2, 1, 1]),
    ],
)
def test_punica_popularity(law: str, counts: list[int]) -> None:
    assert popularity(law, 32) == counts
    trace = make_workload(f"punica:{law},requests=32")
    assert np.bincount(trace.tenants).tolist() == counts
    assert set(trace.times.tolist()) == {0.0}


def test_punica_lengths_are_those_of_its_distributions() -> None:
    trace = make_workload("punica:distinct,requests=200")
    rng = np.random.Generator(np.random.PCG64(seed=0xABCDABCD987))
    prompts = scipy.stats.lognorm(0.8, -1.0, 18.0).rvs(size=200, random_state=rng)
    totals = scipy.stats.randint(0, 2048).rvs(size=200, random_state=rng)
    prompts = np.minimum(prompts, 2046).astype(int)
    assert trace.prompts.tolist() == np.maximum(prompts, 1).tolist()
    assert trace.outputs.tolist() == (np.maximum(prompts + 2, totals) - prompts).tolist()


# --- SGLang ---------------------------------------------------------------------------


def test_sglang_distributions() -> None:
    assert make_workload("sglang:distinct,adapters=3,requests=7").adapters.tolist() == [
        1, 2, 3, 1, 2, 3, 1,
    ]  # fmt: skip
    skewed = make_workload("sglang:skewed,adapters=3,alpha=2,requests=70000")
    assert np.bincount(skewed.clients) / 10_000 == pytest.approx([4, 2, 1], rel=0.05)
    uniform = make_workload("sglang:uniform,adapters=4,requests=40000")
    assert np.bincount(uniform.clients) / 10_000 == pytest.approx([1] * 4, rel=0.05)
    assert np.diff(uniform.times).mean() == pytest.approx(0.25, rel=0.05)


# --- files ----------------------------------------------------------------------------

ROWS = [
    {"time": 5, "tenant": "a", "adapter": "x", "prompt_tokens": 3, "output_tokens": 4},
    {"time": 2, "tenant": "b", "adapter": "", "prompt_tokens": 1, "output_tokens": 2,
     "max_new_tokens": 9, "priority": 1, "weight": 2.0},
    {"time": 7, "tenant": "a", "adapter": "y", "prompt_tokens": 5, "output_tokens": 6, "rank": 64},
]  # fmt: skip


def as_csv(path: Path) -> None:
    names = ["time", "tenant", "adapter", "prompt_tokens", "output_tokens", "max_new_tokens",
             "priority", "weight", "rank"]  # fmt: skip
    lines = [",".join(str(row.get(name, "")) for name in names) for row in ROWS]
    path.write_text("\n".join([",".join(names), *lines]))


@pytest.mark.parametrize("name", ["own.csv", "own.json", "own.jsonl"])
def test_own_traces_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("csv"):
        as_csv(path)
    elif name.endswith("l"):
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    else:
        path.write_text(json.dumps(ROWS))
    trace = make_workload(f"file:{path}")
    assert trace.times.tolist() == [0, 3, 5]
    assert [trace.tenant_names[i] for i in trace.tenants] == ["b", "a", "a"]
    assert trace.tenant_weights == (2.0, 1.0)
    assert [trace.adapter_names[i] for i in trace.adapters] == ["base", "x", "y"]
    assert trace.adapter_ranks == (0, 16, 64)
    assert trace.limits.tolist() == [9, 4, 6]
    assert trace.priorities.tolist() == [1, 0, 0]


def test_an_own_trace_without_a_column_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('[{"time": 0, "adapter": "x", "prompt_tokens": 3}]')
    with pytest.raises(ValueError, match="request 1 has no output_tokens"):
        make_workload(f"file:{path}")


# --- names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arena", "there are slora, vtc"),
        ("vtc:nothing", "VTC has the suites overload"),
        ("slora:s1,speed=2", "slora has no option speed=2; its options are seed, n"),
        ("slora:s1,prompt=8", "prompt is given as in prompt=8-512"),
        ("slora:s1,n=many", "n is given as in n=100"),
        ("slora:s1,duration=0", "no requests"),
        ("punica:zipf", "distinct, identical, uniform and skewed"),
        ("sglang:zipf", "uniform, distinct and skewed"),
        ("slora:s9", "S-LoRA has the settings s1, s2"),
    ],
)
def test_what_is_no_workload_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_workload(text)


def test_a_seed_gives_another_workload_and_the_same_one_again() -> None:
    one, again, other = (make_workload("slora:s1", seed) for seed in (1, 1, 2))
    assert one.times.tolist() == again.times.tolist() != other.times.tolist()


def test_clients_may_ask_for_more_than_they_get() -> None:
    trace = trace_of_clients(
        "t", times=[0, 0], clients=[0, 0], prompts=[1, 1], outputs=[5, 50], ranks=[8]
    )
    assert trace.asking_for(20).limits.tolist() == [20, 50]
