"""What `lorax-ray` says before it has a cluster."""

from __future__ import annotations

import json
import socket
import subprocess
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
    about = {"url": "http://h:1", "ingresses": [{"url": "http://h:1"}]}
    return {**about, "wanted": 1, "generation": 1, "groups": [group]} | values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"url": "", "ingresses": []}, False),
        ({"ingresses": [{"url": "http://h:1"}, {"url": ""}]}, False),
        ({"wanted": 2}, False),
        ({"generation": 2}, False),
        ({"groups": [{"state": "starting", "generation": 1}]}, False),
        ({"groups": [], "wanted": 0}, False),
    ],
)
def test_all_is_as_wanted(values: dict[str, Any], expected: bool) -> None:
    assert is_settled(known(**values), 1) is expected


_TALKATIVE = """
import os, sys, threading, types

def talk(words):
    os.write(1, words.encode())
    print(words)
    threading.Thread(target=os.write, args=(1, words.encode())).start()

class Service(types.ModuleType):
    def is_there(self, name): talk("(raylet) a node died"); return True
    def ask_controller(self, name, method, *arguments):
        return {"groups": [], "wanted": 1, "least": 1, "most": 1, "error": ""}
    def ask_ingresses(self, name, method):
        about = {"host": "h", "metrics": "http://h:2/metrics", "error": ""}
        return [{"name": f"ingress-{n}", "url": f"http://h:{n}", **about} for n in (1, 2)]

class Cluster(types.ModuleType):
    def connect(self, address, name): talk("connected to Ray")

from lorax_launcher import placing
for name, module in (("service", Service), ("ray_cluster", Cluster)):
    made = module(name)
    sys.modules[f"lorax_launcher.placing.{name}"] = made
    setattr(placing, name, made)
from lorax_launcher.placing.cli import main
main(["status", *sys.argv[1:]])
"""


@pytest.mark.parametrize("options", [["--json"], []])
def test_what_ray_says_is_not_among_the_answer(options: list[str]) -> None:
    command = [sys.executable, "-c", _TALKATIVE, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    if options:
        assert json.loads(done.stdout)["url"] == "http://h:1"
    else:
        ingresses = [f"  ingress-{n}  ready     h  http://h:2/metrics" for n in (1, 2)]
        assert done.stdout.splitlines() == ["http://h:1: 1 wanted", *ingresses]
    assert done.stderr.count("a node died") == 3
    assert done.stderr.count("connected to Ray") == 3
