"""The GPU check's command: each stage fails alone, within its time, with its words in the table."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch
from bench.gpu_check import __main__ as command
from bench.gpu_check import correctness, measure, parity, plan, profile, sweep, tables
from bench.gpu_check.drawing import KINDS
from bench.gpu_check.machine import ROOT, describe
from bench.gpu_check.report import Report, to_markdown
from tests.helpers.fake_gpu import run_on_fake_gpu

STAGES = "tests.helpers.gpu_stages"


def stage(name: str) -> plan.CheckStage:
    return plan.CheckStage(name, f"{STAGES}.{name}", f"The stage that {name}", 60.0, 1)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "report.json")


def test_all_stages_together_stay_below_nine_minutes_and_the_first_part_below_four() -> None:
    assert sum(stage.budget_s for stage in plan.STAGES) <= 520
    assert sum(stage.budget_s for stage in plan.STAGES if stage.part == 1) <= 235
    assert [stage.part for stage in plan.STAGES] == sorted(stage.part for stage in plan.STAGES)
    for stage in plan.STAGES:
        assert callable(importlib.import_module(stage.module).run)


def test_a_stage_that_raises_says_so(tmp_path: Path) -> None:
    result = command.run_stage(stage("fails"), tmp_path / "fails.log", small=True, budget_s=60)
    assert result["status"] == "failed"
    assert result["text"] == "ValueError: nothing fits | here\nat all"
    assert result["tables"][0]["rows"] == [["first", True]]


def test_a_stage_that_crashes_leaves_its_last_words(tmp_path: Path) -> None:
    result = command.run_stage(stage("crashes"), tmp_path / "crashes.log", small=True, budget_s=60)
    assert result["status"] == "failed"
    assert "code 134" in result["text"]
    assert "illegal memory access" in result["text"]


def test_a_stage_that_hangs_is_cut_with_its_children_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "child"))
    budget_s = 1.0
    while True:  # a busy machine may take longer to come to the row
        result = command.run_stage(
            stage("hangs"), tmp_path / "hangs.log", small=True, budget_s=budget_s
        )
        if result["tables"] and result["tables"][0]["rows"]:
            break
        budget_s *= 2
    assert result["status"] == "failed"
    assert "was cut after" in result["text"]
    child = int((tmp_path / "child").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        # It was killed; the kernel takes a moment.
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def test_the_page_names_machine_ends_and_figures(tmp_path: Path) -> None:
    failed = command.run_stage(stage("fails"), tmp_path / "fails.log", small=True, budget_s=60)
    machine = describe(small=True)
    assert {"torch", "triton", "transformers", "driver", "commit"} <= machine.keys()
    page = to_markdown({"machine": machine, "small": True, "stages": [failed]})
    assert f"| torch | {metadata.version('torch')} |" in page
    assert "| The stage that fails | failed |" in page
    assert "nothing fits \\| here at all" in page
    assert "| first | True |" in page


def test_it_asks_for_a_gpu_and_for_stages_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--small", "--stages", "speed"])
    assert "no such stage: speed" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            command.main([])
        assert "torch sees no GPU" in capsys.readouterr().err


def test_stages_find_the_checkout_without_an_installation(tmp_path: Path) -> None:
    values = command.environment(small=True)
    code = (
        "import lorax_shard, lorax_router, lorax_launcher, lorax_proto, lorax_bench, bench, tests"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=values, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert values["TRITON_INTERPRET"] == "1"
    assert "TRITON_INTERPRET" not in command.environment(small=False)


def test_each_part_runs_its_stages_in_order_and_keeps_their_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "STAGES", (stage("fails"), stage("crashes")._replace(part=2)))
    assert command.main(["--small", "--part", "1", "--out", str(tmp_path)]) == 1
    assert command.main(["--small", "--part", "2", "--out", str(tmp_path)]) == 1
    names = [
        f"gpu-check-small-part-{part}.{end}" for part in (1, 2) for end in ("json", "log", "md")
    ]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    first, second = (json.loads((tmp_path / names[at]).read_text()) for at in (0, 3))
    assert [each["stage"] for each in first["stages"]] == ["fails"]
    assert [each["stage"] for each in second["stages"]] == ["crashes"]
    assert "ValueError: nothing fits" in (tmp_path / names[1]).read_text()
    assert "illegal memory access" in (tmp_path / names[4]).read_text()


def test_a_capture_that_fails_leaves_one_cell_empty(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(call):
        call()
        return call

    def broken() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(measure, "capture", capture)
    monkeypatch.setattr(measure, "seconds", lambda call, device, **_: 1.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    graphs = measure.Graphs(report, torch.device("cuda"))
    assert [graphs.seconds(call) for call in (int, broken, broken, int)] == [1.0, None, None, 1.0]
    assert [graphs.per_call(call, 4) for call in (int, broken)] == [0.25, None]
    assert len(report.data["notes"]) == 1
    assert report.data["notes"][0].endswith("operation not permitted when stream is capturing")


@pytest.mark.slow
def test_tables_have_a_line_for_each_step(report: Report) -> None:
    tables.run(report, small=True)
    decode, prompts, drawing = report.data["tables"]
    labels = ["0", "2", "2 of rank 4, all linears", "2 of rank 4, attention's"]
    assert [row[:2] for row in decode["rows"]] == [[2, label] for label in labels]
    column = decode["columns"].index
    # What is added may be lost in what disturbs a busy machine.
    assert all(isinstance(row[column("added / floor")], float) for row in decode["rows"][1:])
    floors = [row[column("their floor")] for row in decode["rows"][1:]]
    assert floors[0] > floors[1] > floors[2] > 0
    assert decode["rows"][0][column("launches")] > 0
    assert [row[:3] for row in prompts["rows"]] == [
        [1, 6, 0], [1, 6, 1], [2, 4, 0], [2, 4, 1], [2, 4, 2],
    ]  # fmt: skip
    assert [row[:2] for row in drawing["rows"]] == [[2, kind] for kind in KINDS]
    assert all(value is None or value > 0 for row in drawing["rows"] for value in row[2:])
    assert report.data["notes"][-1].startswith("kernel variants compiled before the first step: ")


@pytest.mark.slow
def test_what_is_compiled_after_the_warm_up_is_counted(tmp_path: Path) -> None:
    assert run_on_fake_gpu("tests.helpers.gpu_launches:counted_compilations", cache=tmp_path)


def test_the_floor_of_a_step_counts_every_byte_once() -> None:
    model = tables.build(tables.TINY, torch.float32, torch.device("cpu"), lora="torch")
    sizes = tables.load_adapters(model, [3, 8], first_slot=5)
    shape = tables.TINY
    norms = shape.hidden * (2 * shape.layers + 1)
    weights = shape.linear_params + 2 * shape.head_params + norms
    # Rotary frequencies are buffers.
    assert 0 <= model.weight_bytes - 4 * weights <= 4 * shape.head_dim
    widths = [64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 96, 64 + 96, 96 + 64]
    assert sizes == {5: 12 * shape.layers * sum(widths), 6: 32 * shape.layers * sum(widths)}
    own = tables.load_adapters(model, [3], modules=tables.ATTENTION)
    assert own == {0: 12 * shape.layers * sum(widths[:4])}


def test_profiles_name_the_largest_parts_of_a_step(report: Report) -> None:
    profile.run(report, small=True)
    plain, adapted = report.data["tables"]
    for table in (plain, adapted):
        assert 1 < len(table["rows"]) <= 15
        together = [row[3] for row in table["rows"]]
        assert together == sorted(together, reverse=True)
    assert "2 adapters" in adapted["title"]


def test_sweeps_leave_every_launch_size_as_it_was(report: Report) -> None:
    sizes = (sweep.attention._DECODE_FULL, sweep.lora._EXPAND_FULL, sweep.lora._EXPAND_HALF)
    before = [dict(tiles) for tiles in sizes]
    sweep.run(report, small=True)
    assert before == [dict(tiles) for tiles in sizes]
    decode, group = report.data["tables"]
    assert decode["columns"][2:] == ["16 keys, 2 stages", "32 keys, 2 stages"]
    assert all(value > 0 for table in (decode, group) for value in table["rows"][0][1:])


def test_parity_notices_a_wrong_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = parity.make_tiny_model("llama", tmp_path)
    model = parity.load(model_dir, "cpu", torch.float32, parity.Choice("torch", "torch"))
    expected = parity.logits_of(model)
    assert len(expected) == sum(parity.LENGTHS) + len(parity.LENGTHS)
    monkeypatch.setattr(parity, "SLOTS", (0, None, 2, 2, 0))
    model = parity.load(model_dir, "cpu", torch.float32, parity.Choice("sdpa", "cpu"))
    got = parity.logits_of(model)
    wrong = parity.errors(got, expected) > parity.TOLERANCES[torch.float32]
    assert int(wrong.sum()) == parity.LENGTHS[2] + 1


def test_contract_results_are_counted_by_backend(report: Report) -> None:
    cases = "".join(
        f'<testcase classname="tests.contract.lora.test_backends" name="{name}">{end}</testcase>'
        for name, end in (
            ("test_any[triton-64]", ""),
            ("test_any[triton-1]", '<failure message="off by 3&#10;more">trace</failure>'),
            ("test_any[flash]", '<skipped message="flash: not installed"/>'),
            ("test_other", ""),
        )
    )
    fromstring = correctness.ET.fromstring
    roots = [fromstring(f"<suites><suite>{each}</suite></suites>") for each in (cases, "")]
    failed = correctness.tabulate(report, roots)
    assert failed == ["contract.lora.test_backends::test_any[triton-1]: off by 3"]
    assert [row[1:] for row in report.data["tables"][0]["rows"]] == [
        ["", 1, 0, 0], ["flash", 0, 0, 1], ["triton", 1, 1, 0],
    ]  # fmt: skip
    assert report.data["notes"] == ["1 skipped: flash: not installed"]


def test_a_report_is_whole_at_any_time(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    report.table("Numbers", ("a", "b"))
    report.row(1, None)
    assert json.loads((tmp_path / "report.json").read_text())["tables"][0]["rows"] == [[1, None]]
    assert os.listdir(tmp_path) == ["report.json"]
    report.end("failed", "first")
    report.end("ok")
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "failed"


def test_suites_that_are_named_exist() -> None:
    assert [suite for suite in correctness.SUITES if not (ROOT / suite).exists()] == []
