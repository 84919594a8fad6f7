"""Steps that are launched before the ones before them are collected give the same answers."""

from __future__ import annotations

import pytest
from tests.helpers.overlapped import answered, mixed_requests

from lorax_contract.step import FinishCode
from lorax_shard.sampling.batched import draw_batch


@pytest.mark.parametrize(
    ("drafts", "method"),
    [(False, None), (True, None), (False, draw_batch), (True, draw_batch)],
    ids=["ids read", "drafts, ids read", "ids on the device", "drafts, ids on the device"],
)
def test_answers_at_any_depth_are_those_of_steps_one_by_one(drafts, method):
    requests = mixed_requests(60, seed=4)
    cancelled = [spec.request_id for spec in requests[::13]]
    options = {"drafts": drafts, "method": method, "cancelled": cancelled}
    expected, _ = answered(requests, 1, **options)
    num_preemptions = num_swaps = 0
    for depth in (2, 3):
        found, scheduler = answered(requests, depth, **options)
        for spec in requests:
            one, other = found[spec.request_id], expected[spec.request_id]
            if spec.request_id in cancelled:
                # How far it came is a matter of time.
                ids = (one.tokens.ids, other.tokens.ids)
                assert min(ids, key=len) == max(ids, key=len)[: min(map(len, ids))]
            else:
                assert one.bits() == other.bits()
        num_preemptions += scheduler.stats().num_preemptions
        num_swaps += scheduler.stats().host.num_swaps
    assert num_preemptions > 0
    assert num_swaps > 0
    assert {answer.finish for answer in expected.values()} == set(FinishCode)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    ("drafts", "method"),
    [(False, None), (True, None), (False, draw_batch)],
    ids=["ids read", "drafts, ids read", "ids on the device"],
)
def test_answers_are_those_of_steps_of_which_no_pass_fails(depth, drafts, method):
    """Whoever is to blame ends as before, and nobody else sees that passes fail at random."""
    requests = mixed_requests(60, seed=5)
    cancelled = [spec.request_id for spec in requests[::13]]
    options = {"drafts": drafts, "method": method, "cancelled": cancelled}
    expected, _ = answered(requests, 1, **options)
    found, _ = answered(requests, depth, failing=0.1, **options)
    for spec in requests:
        if spec.request_id not in cancelled:
            assert found[spec.request_id].bits() == expected[spec.request_id].bits()
    errors = [each.error for each in expected.values() if each.finish is FinishCode.ERROR]
    assert any("the forward pass failed for this request" in error for error in errors)
