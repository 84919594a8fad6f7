"""Who asks, and by which call, goes along with every request.

A front end that forgot the first would let all tenants do all; the second, and it would be in no trace.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROUTER = Path(__file__).parents[2] / "router/lorax_router"
FRONTS = sorted([*(ROUTER / "http_api").rglob("*.py"), *(ROUTER / "grpc_api").rglob("*.py")])


def requests_without_a_caller(source: str) -> list[int]:
    """Lines that make a GenerateRequest of the service's and say not who asks, or how."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "GenerateRequest"
        and not {"caller", "origin"} <= {each.arg for each in node.keywords}
    ]


@pytest.mark.parametrize("path", FRONTS, ids=lambda path: str(path.relative_to(ROUTER)))
def test_every_request_of_a_front_end_says_who_asks(path: Path) -> None:
    assert requests_without_a_caller(path.read_text()) == []


def test_a_request_without_a_caller_is_found() -> None:
    assert requests_without_a_caller("x = GenerateRequest(prompt=p)") == [1]
    assert requests_without_a_caller("x = GenerateRequest(prompt=p, caller=c)") == [1]
    assert requests_without_a_caller("x = GenerateRequest(prompt=p, caller=c, origin=o)") == []
