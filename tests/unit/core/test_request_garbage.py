"""What has ended is gone at once: a collection of garbage holds all streams up."""

from __future__ import annotations

import gc

from tests.helpers.core_world import CoreWorld

from lorax_router.core.policies.fair import FairShare
from lorax_router.core.request import ANY_TERMS, RequestState


def num_requests() -> int:
    return sum(type(each) is RequestState for each in gc.get_objects())


def test_requests_that_have_ended_wait_for_no_collection_of_garbage():
    world = CoreWorld(FairShare(), num_blocks=20)
    gc.collect()
    before = num_requests()
    gc.disable()
    try:
        for _ in range(30):
            # More than the pool has room for: some give way and come again.
            world.submit(ANY_TERMS, num_prompt=12, num_output=12)
        world.run_until_idle()
        assert world.num_preemptions
        assert num_requests() == before
    finally:
        gc.enable()
