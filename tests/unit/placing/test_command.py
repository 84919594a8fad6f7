"""What `lorax-ray` says before it has a cluster."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from lorax_launcher.placing.cli import check_answers, is_settled, main


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lorax_launcher.placing.ray_cluster", raising=False)
    result = CliRunner().invoke(main, ["status"])
    assert result.exit_code == 1
    assert "pip install 'lorax-py[ray]'" in result.output


def test_where_nobody_listens_nobody_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check_answers(address)
    with pytest.raises(ConnectionRefusedError):
        check_answers(address)
    check_answers("auto")


def known(**values: Any) -> dict[str, Any]:
    group = {"state": "ready", "generation": 1}
    return {"url": "http://h:1", "wanted": 1, "generation": 1, "groups": [group]} | values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"url": ""}, False),
        ({"wanted": 2}, False),
        ({"generation": 2}, False),
        ({"groups": [{"state": "starting", "generation": 1}]}, False),
        ({"groups": [], "wanted": 0}, False),
    ],
)
def test_all_is_as_wanted(values: dict[str, Any], expected: bool) -> None:
    assert is_settled(known(**values), 1) is expected
