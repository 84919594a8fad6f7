"""What is asked for of graphs: on a GPU, by one rank, unless somebody does not want them."""

from __future__ import annotations

from typing import Any

import pytest

from lorax_contract.config import ShardConfig
from lorax_contract.step import WarmupSpec
from lorax_shard.engine.graph_limits import GraphLimits


def limits(max_adapter_rank: int = 64, **options: Any) -> GraphLimits | None:
    chosen = {"device": "cuda", "shard_uris": ["unix:///a"], **options}
    config = ShardConfig(model_id="m", model_dir="m", **chosen)
    return GraphLimits.of(config, max_adapter_rank)


@pytest.mark.parametrize(
    "options",
    [
        {"eager": True},
        {"world_size": 2, "shard_uris": ["unix:///a", "unix:///b"], "rendezvous": "tcp://a:1"},
    ],
)
def test_no_graphs_are_asked_for(options: dict[str, Any]) -> None:
    assert limits(**options) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, GraphLimits(256, 64, 1024)),
        ({"max_adapter_rank": 0}, GraphLimits(256, 0, 1024)),
        ({"graph_max_rows": 8, "graph_max_rank": 16}, GraphLimits(8, 16, 1024)),
        ({"graph_max_rank": 128, "max_active_adapters": 3}, GraphLimits(256, 64, 3)),
    ],
)
def test_limits_are_those_of_the_configuration(
    options: dict[str, Any], expected: GraphLimits
) -> None:
    assert limits(**options) == expected


@pytest.mark.parametrize(("max_rows", "expected"), [(4, 4), (1000, 256)])
def test_graphs_have_room_for_steps_that_will_be_sent(max_rows: int, expected: int) -> None:
    spec = WarmupSpec(
        max_input_length=10, max_total_tokens=100, max_step_tokens=64, max_rows=max_rows
    )
    found = limits()
    assert found is not None
    settings = found.settings(spec)
    assert (settings.max_rows, settings.max_context) == (expected, 100)
