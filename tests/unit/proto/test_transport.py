"""Errors keep their meaning across the wire."""

from __future__ import annotations

import grpc
import pytest

from lorax_contract.errors import (
    GenerationError,
    ShardError,
    ShardUnavailableError,
    StaleEpochError,
    UnhealthyError,
    ValidationError,
)
from lorax_proto.transport import error_of, status_of


@pytest.mark.parametrize(
    ("raised", "received"),
    [
        (StaleEpochError("x"), StaleEpochError),
        (ShardUnavailableError("x"), ShardUnavailableError),
        (ShardError("x"), ShardError),
        (GenerationError("x"), GenerationError),
        (UnhealthyError("x"), ShardUnavailableError),
        (ValidationError("x"), ShardError),
        (KeyError("x"), ShardError),
    ],
)
def test_an_error_comes_back_as_what_the_router_needs(raised, received):
    error = error_of(status_of(raised), str(raised), "rank 3")
    assert type(error) is received
    assert str(error).startswith("rank 3: ")
    assert "x" in str(error)


@pytest.mark.parametrize("status", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"])
def test_what_the_transport_says_of_a_lost_shard(status):
    error = error_of(grpc.StatusCode[status], None, "rank 0")
    assert type(error) is ShardUnavailableError
    assert status in str(error)
