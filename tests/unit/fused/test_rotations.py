"""Queries and keys that are turned when K and V are stored."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tests.helpers.fused_models import make_model
from tests.helpers.fused_together import NAME, FusedTogether, together  # noqa: F401 - a fixture

from lorax_shard.fused import LostRotationError, rotations_of
from lorax_shard.fused.backend import PendingRotation, Rotation
from lorax_shard.fused.rotary import Rotations
from lorax_shard.model import attention_hook, elementwise

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("together")


def make_pending() -> PendingRotation:
    query, key = torch.randn(1, 3, 5, 8), torch.randn(1, 1, 5, 8)
    cos, sin = torch.randn(2, 1, 5, 8)
    return PendingRotation(query, key, cos, sin, Rotation(False, False))


def test_nothing_waits_where_nothing_is_deferred() -> None:
    rotations, pending = Rotations(FusedTogether()), make_pending()
    found = rotations.rotate(pending)
    for each, expected in zip(found, FusedTogether().rotate(*pending), strict=True):
        assert torch.equal(each, expected)
    assert rotations.take(*found) is None


def test_what_is_deferred_waits_for_those_very_tensors() -> None:
    rotations, pending = Rotations(FusedTogether()), make_pending()
    rotations.are_deferred = True
    query, key = rotations.rotate(pending)
    assert query is pending.query
    assert key is pending.key
    assert rotations.take(query, key) is pending
    assert rotations.take(query, key) is None


@pytest.mark.parametrize("which", [0, 1])
def test_what_was_changed_since_is_not_taken_for_what_waits(which: int) -> None:
    rotations, pending = Rotations(FusedTogether()), make_pending()
    rotations.are_deferred = True
    handed = list(rotations.rotate(pending))
    handed[which] = handed[which] * 2
    with pytest.raises(LostRotationError, match="changes queries and keys after they are turned"):
        rotations.take(*handed)
    assert rotations.take(*handed) is None


def test_a_rotation_that_nobody_takes_is_missed() -> None:
    rotations = Rotations(FusedTogether())
    rotations.are_deferred = True
    rotations.rotate(make_pending())
    with pytest.raises(LostRotationError, match="never turned"):
        rotations.rotate(make_pending())
    # The next pass is none the worse for it.
    pending = make_pending()
    assert rotations.take(*rotations.rotate(pending)) is pending


def plugged(family: str) -> Any:
    attention_hook.register()
    model = make_model(family)
    model.set_attn_implementation(attention_hook.ATTENTION_NAME)
    return model


@pytest.mark.parametrize(("family", "are_deferred"), [("llama", True), ("phi", False)])
def test_a_model_s_rotations_wait_where_nothing_comes_between(
    family: str, are_deferred: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = plugged(family)
    with caplog.at_level(logging.INFO):
        exchanged = elementwise.install(model, NAME, CPU, torch.float32)
    assert exchanged.counts["rotary attentions"] == 2
    assert exchanged.rotations.are_deferred is are_deferred
    words = "queries and keys are turned before they are stored: an attention changes queries"
    assert (words in caplog.text) is not are_deferred
    attentions = [each for each in model.modules() if hasattr(each, "layer_idx")]
    assert exchanged.rotations in [rotations_of(each) for each in attentions]
    exchanged.undo()
    assert {rotations_of(each) for each in attentions} == {None}


def test_a_backend_that_stores_nothing_turns_at_once() -> None:
    model = plugged("llama")
    exchanged = elementwise.install(model, "torch", CPU, torch.float32)
    assert not exchanged.rotations.are_deferred
