"""Who is in the batch and in the queue, as people who look see it."""

from __future__ import annotations

from tests.helpers.core_world import CoreWorld

from lorax_router.core.policies.fair import FairShare
from lorax_router.core.request import RequestTerms


def test_requests_are_counted_by_adapter_and_tenant() -> None:
    it = CoreWorld(FairShare(), max_rows=2)
    ant, bee = RequestTerms("ant"), RequestTerms("bee")
    it.submit(ant, num_prompt=5, num_output=3)
    it.submit(bee, num_prompt=4, num_output=3)
    it.submit(bee, num_prompt=6, num_output=3)
    assert [(each.tenant, each.num_running, each.num_waiting) for each in it.scheduler.groups()] == [
        ("bee", 0, 2), ("ant", 0, 1),
    ]  # fmt: skip
    it.step()
    groups = {each.tenant: each for each in it.scheduler.groups()}
    assert groups["ant"][:4] == (0, "ant", 1, 0)
    assert groups["bee"][:4] == (0, "bee", 1, 1)
    # Prompts, and the token that each row got; a block has 4 of them.
    assert (groups["ant"].num_tokens, groups["ant"].num_blocks) == (6, 2)
    assert groups["bee"].num_tokens == 4 + 1 + 6
    stats = it.scheduler.stats()
    assert sum(each.num_blocks for each in groups.values()) == (
        stats.num_blocks - stats.num_free_blocks
    )
    it.run_until_idle()
    assert it.scheduler.groups() == []


def test_each_adapter_is_a_group_and_the_largest_comes_first() -> None:
    it = CoreWorld(FairShare())
    for adapter in (1, 2, 2):
        it.submit(RequestTerms(), adapter=adapter)
    assert [(each.adapter, each.num_waiting) for each in it.scheduler.groups()] == [(2, 2), (1, 1)]
