"""Reports: figures by hand, the same bytes for the same run, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tests.unit.simulator.test_driver import SLOW, requests

from lorax_contract.config import SCHEDULING_POLICIES
from lorax_router.core.cost import StepWork
from lorax_router.simulator.cli import main
from lorax_router.simulator.driver import SimulatedRun, Simulation
from lorax_router.simulator.report import as_json, figures, light, report
from lorax_router.simulator.trace import Trace
from lorax_router.simulator.workloads.catalog import make_workload


def simulate(trace: Trace, policy: str = "fcfs") -> SimulatedRun:
    return Simulation(trace, SLOW, policy).run()


def test_figures_by_hand() -> None:
    # Of two clients the second comes while the first's long prompt is computed.
    trace = requests((0.0, 32, 1), (0.1, 4, 1), (20.0, 4, 2), clients=[0, 1, 1], ranks=(0, 0))
    found = figures(simulate(trace), slo_s=2.0)
    # 16 and 16 tokens until 5.2; 4 until 6.6; from 20 on 4 and 1.
    assert found["first_token_s"]["max"] == pytest.approx(6.5)
    assert found["duration_s"] == pytest.approx(22.5)
    assert found["tokens_per_s"] == pytest.approx((40 + 4) / 22.5)
    assert found["busy"] == pytest.approx((5.2 + 1.4 + 2.5) / 22.5)
    assert found["slo_by_request"] == pytest.approx(1 / 3)
    assert found["slo_by_client"] == pytest.approx((0 + 1 / 2) / 2)
    assert found["between_tokens_s"]["p50"] == pytest.approx(1.1)
    assert found["tenants"]["tenant-1"]["requests"] == 2
    assert found["tenants"]["tenant-0"]["first_token_s"]["p50"] == pytest.approx(5.2)
    assert found["adapters"]["base"]["requests"] == 3
    # The one asks for 34 of 48 weighted tokens.
    assert light(trace).tolist() == [False, True, True]
    assert found["light_clients_first_token_s"]["max"] == pytest.approx(6.5)


def test_classes_are_told_apart() -> None:
    trace = make_workload("slora:s1,n=2,rate=1,duration=20,prompt=4-8,output=4-8")
    classes = figures(simulate(trace))["classes"]
    assert list(classes) == ["0"]
    assert classes["0"]["requests"] == len(trace)


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_the_same_seed_gives_the_same_bytes(policy: str) -> None:
    def run() -> bytes:
        trace = make_workload("slora:s2,n=5,rate=4,duration=10,prompt=1-100,output=1-100", 3)
        return as_json(report([simulate(trace, policy)], seed=3))

    assert run() == run()


def test_a_report_is_json_without_what_json_lacks() -> None:
    # One token each: there is no time between tokens.
    values = json.loads(as_json(report([simulate(requests((0.0, 4, 1)))], seed=None)))
    assert values["policies"]["fcfs"]["between_tokens_s"]["p50"] is None
    assert values["workload"]["prompt_tokens"] == 4


# --- the command line -----------------------------------------------------------------

SHORT = ["--workload", "vtc:overload,minutes=0.2", "--policy", "fcfs", "--policy", "fair"]


def invoke(*arguments: str | Path) -> str:
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_policies_are_compared_in_a_table() -> None:
    output = invoke(*SHORT)
    assert "largest service gap" in output
    assert "fcfs" in output
    assert "fair" in output


def test_a_report_goes_to_a_file_or_to_standard_output(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    invoke(*SHORT, "--json", path, "--kv-tokens", "2000")
    values = json.loads(path.read_text())
    assert list(values["policies"]) == ["fair", "fcfs"]
    assert values["server"]["kv_tokens"] == 2000
    assert values["bound"]["vtc"] == 8000
    assert json.loads(invoke(*SHORT, "--json", "-", "--kv-tokens", "2000")) == values


@pytest.mark.parametrize(("name", "magic"), [("plot.svg", b"<?xml"), ("plot.png", b"\x89PNG")])
def test_plots_are_drawn(tmp_path: Path, name: str, magic: bytes) -> None:
    paths = [tmp_path / "one" / name, tmp_path / "two" / name]
    for path in paths:
        path.parent.mkdir()
        invoke(*SHORT, "--plot", path)
    assert paths[0].read_bytes().startswith(magic)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_plots_without_matplotlib_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    done = CliRunner().invoke(main, [*SHORT, "--plot", str(tmp_path / "plot.svg")])
    assert done.exit_code == 1
    assert "install lorax-py[plots]" in done.output


def test_recorded_steps_give_the_price(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    works = [StepWork(n, 10 * n * n, 0, 0) for n in range(1, 50)]
    lines = [json.dumps({**w._asdict(), "seconds": 0.5 + 0.01 * w.tokens}) for w in works]
    path.write_text("\n".join(lines))
    report_path = tmp_path / "report.json"
    output = invoke(*SHORT, "--steps", path, "--json", report_path)
    assert "median error 0.0% of 49 steps" in output.replace("\n", " ")
    cost = json.loads(report_path.read_text())["server"]["cost"]
    assert np.isclose(cost["fixed_s"], 0.5)
    assert np.isclose(cost["token_s"], 0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "vtc:none"], "VTC has the suites"),
        (["--kv-tokens", "100"], "KV cache holds"),
        (["--workload", "file:/nowhere.csv"], "No such file"),
        (["--policy", "random"], "is not one of"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_words(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code != 0
    assert words in done.output
    assert "Traceback" not in done.output


def test_help_names_workloads_and_an_example() -> None:
    output = invoke("--help")
    assert "slora:SETTING" in output
    assert "--policy fair --plot overload.svg" in output


def test_where_figures_come_from_can_be_shown() -> None:
    assert "13.5 GB of weights / 480 GB/s" in invoke(*SHORT, "--show-server")
