"""What a scheduler is made of, as one value."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies import make_policy
from lorax_router.core.scheduler import Scheduler
from lorax_router.core.settings import CoreSettings, make_scheduler

# What is made of the settings or learns from outcomes, and what only says how blocks are named.
MADE = {"self", "adapters", "policy", "name", "block_names", "recompute"}


@pytest.mark.parametrize(
    "made", [Scheduler, AdapterTable, make_policy], ids=lambda each: each.__name__
)
def test_whatever_decides_what_is_planned_is_a_setting(made: type) -> None:
    """Else a log of events would not tell it, and its replay would plan something else."""
    fields = {field.name for field in dataclasses.fields(CoreSettings)}
    assert inspect.signature(made).parameters.keys() - MADE <= fields


def test_settings_reach_what_is_made_of_them() -> None:
    """Each value is another."""
    settings = CoreSettings(
        policy="priority", num_blocks=11, block_size=3, max_step_tokens=17, max_rows=5, depth=1,
        epoch=7, max_resident=9, max_bytes=13, cycle_time_s=0.25, num_host_blocks=19,
    )  # fmt: skip
    scheduler = make_scheduler(settings)
    stats = scheduler.stats()
    adapters = scheduler.adapters
    assert (stats.num_blocks, scheduler.block_size, scheduler.max_step_tokens) == (11, 3, 17)
    assert stats.host.num_blocks == 19
    assert (scheduler.max_rows, scheduler.depth, scheduler.epoch) == (5, 1, 7)
    assert (adapters.max_resident, adapters.max_bytes, adapters.cycle_time_s) == (9, 13, 0.25)
