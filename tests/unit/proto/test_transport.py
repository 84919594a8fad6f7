"""Errors keep their meaning across the wire."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc

from lorax_contract.errors import (
    GenerationError,
    ShardError,
    ShardUnavailableError,
    StaleEpochError,
    UnhealthyError,
    ValidationError,
)
from lorax_proto.transport import CLIENT_OPTIONS, SERVER_OPTIONS, error_of, status_of


@pytest.mark.parametrize(
    ("raised", "received"),
    [
        (StaleEpochError("x"), StaleEpochError),
        (ShardUnavailableError("x"), ShardUnavailableError),
        (ShardError("x"), ShardError),
        (GenerationError("x"), ShardError),
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


def test_every_channel_option_is_one_that_the_library_knows():
    """The library says nothing of a name that it does not know, and goes on without."""
    known = set(re.findall(rb"grpc\.[a-z0-9_.]+", Path(cygrpc.__file__).read_bytes()))
    used = {
        node.value
        for room in ("proto", "router", "shard")
        for path in (Path(__file__).parents[3] / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"grpc\.[a-z0-9_.]+", node.value)
    }
    assert {name for name, _ in (*CLIENT_OPTIONS, *SERVER_OPTIONS)} <= used
    assert {name for name in used if name.encode() not in known} == set()
