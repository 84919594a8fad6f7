"""Who asks goes along with every request: a front end that forgot it would let all tenants do all."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROUTER = Path(__file__).parents[2] / "router/lorax_router"
FRONTS = sorted([*(ROUTER / "http_api").rglob("*.py"), *(ROUTER / "grpc_api").rglob("*.py")])


def requests_without_a_caller(source: str) -> list[int]:
    """Lines that make a GenerateRequest of the service's and say not who asks."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "GenerateRequest"
        and "caller" not in {each.arg for each in node.keywords}
    ]


@pytest.mark.parametrize("path", FRONTS, ids=lambda path: str(path.relative_to(ROUTER)))
def test_every_request_of_a_front_end_says_who_asks(path: Path) -> None:
    assert requests_without_a_caller(path.read_text()) == []


def test_a_request_without_a_caller_is_found() -> None:
    assert requests_without_a_caller("x = GenerateRequest(prompt=p)") == [1]
    assert requests_without_a_caller("x = GenerateRequest(prompt=p, caller=c)") == []
