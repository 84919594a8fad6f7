"""Every option of PEFT in one running batch, beside base rows, on one rank and on several."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.helpers.paged_runner import RELATIVE_TOLERANCE, PagedRunner, stock_logits
from tests.helpers.peft_cases import FAMILIES
from tests.helpers.rank_models import read_parts
from tests.helpers.served_oracle import Oracle, Runner, Served, chunked, compare, whole
from tests.helpers.thread_ranks import ThreadGroup, run_ranks
from tests.helpers.tiny_models import VOCAB_SIZE

from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.rank_model import meet


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# Their linears have the names and shapes of Llama's.
SLOW = ("gemma2", "qwen2")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAMILIES
    ],
)
def oracle(
    request: pytest.FixtureRequest, tied: bool, tmp_path_factory: pytest.TempPathFactory
) -> Oracle:
    return Oracle(request.param, tied, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(oracle: Oracle) -> Served:
    return Served(oracle, load_paged_model(oracle.config))


@pytest.mark.parametrize("schedule", [whole, chunked])
def test_a_batch_of_all_options_equals_peft(
    served: Served, schedule: Callable[[PagedRunner], None]
) -> None:
    runner = Runner(served)
    schedule(runner)
    worst = compare(served.rows, runner)
    print(f"FIGURE {len(served.rows)} rows, largest difference {worst:.1e}")


# Whole key heads for each rank, and fewer key heads than ranks.
@pytest.mark.parametrize("world_size", [3, 4])
def test_ranks_together_equal_peft(oracle: Oracle, world_size: int) -> None:
    parts = read_parts(oracle.config, world_size)
    ranks = [Served(oracle, part.paged) for part in parts]

    def work(group: ThreadGroup) -> float:
        meet(parts[group.rank], group)
        runner = Runner(ranks[group.rank])
        chunked(runner)
        return compare(oracle.rows, runner)

    differences = run_ranks(world_size, work)
    print(f"FIGURE {len(oracle.rows)} rows, largest difference {max(differences):.1e}")


def test_each_option_shows(oracle: Oracle) -> None:
    for row in oracle.rows:
        known = [token for token in row.ids if token < VOCAB_SIZE]
        if row.handle is None or len(known) < len(row.ids):
            continue
        base = stock_logits(oracle.path, [row.ids])[0]
        difference = (row.expected - base).abs().max()
        assert difference > 10 * RELATIVE_TOLERANCE * base.abs().max(), row.label
