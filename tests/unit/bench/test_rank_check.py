"""The GPU check's part for several GPUs: what it is asked, and what it finds wrong."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from bench.gpu_check import __main__ as command
from bench.gpu_check import parity, plan
from bench.gpu_check.ranks import failures, group, speed
from bench.gpu_check.ranks import parity as rank_parity
from bench.gpu_check.ranks.failures import HeardStream, LossFigures
from bench.gpu_check.report import Report


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "report.json")


def test_its_stages_are_there_and_stay_below_ten_minutes() -> None:
    assert sum(stage.budget_s for stage in plan.RANK_STAGES) < 600
    names = [stage.name for stage in (*plan.STAGES, *plan.RANK_STAGES)]
    assert len(set(names)) == len(names)
    for stage in plan.RANK_STAGES:
        assert callable(importlib.import_module(stage.module).run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--small --ranks 1", "2 or more"),
        ("--small --ranks 2 --part 1", "--ranks has no parts"),
        ("--small --ranks 2 --stages serving", "no such stage: serving"),
        ("--small --stages ranks-speed", "no such stage: ranks-speed"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(words.split())
    assert said in capsys.readouterr().err


def test_ranks_that_have_no_gpu_each_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(command.machine, "describe", lambda *, small: {"device": "one GPU"})
    with pytest.raises(SystemExit):
        command.main(["--ranks", "2"])
    assert "2 ranks need a GPU each, and torch sees 1" in capsys.readouterr().err


def test_a_stage_is_told_how_many_ranks(tmp_path: Path) -> None:
    stage = plan.CheckStage("ranks", "tests.helpers.gpu_stages.counts_ranks", "Ranks", 60.0, 1)
    result = command.run_stage(stage, tmp_path / "log", small=True, budget_s=60, ranks=3)
    assert (result["status"], result["notes"]) == ("ok", ["3 ranks, small True"])


def test_each_rank_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(small: bool = False) -> list[str]:
        return [group.environment(rank, small)["CUDA_VISIBLE_DEVICES"] for rank in range(2)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert seen() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7,3")
    assert seen() == ["GPU-7", "3"]
    assert seen(small=True) == ["", ""]


def scores(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)[:, None]


def test_a_near_tie_is_no_other_token_and_a_far_one_is() -> None:
    one = scores([1.0, 0.999, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 1.0])
    assert rank_parity.judge_tokens(one, one) == (3, 0, 0)
    # Scores usually differ by 0.001, and of one rank's the two lie 0.001 apart.
    near = one + torch.tensor([[[-0.001, 0.001, 0.0]]] * 3)
    assert rank_parity.judge_tokens(one, near) == (3, 1, 0)
    # The second token's scores lie further apart than any others differ.
    far = near.clone()
    far[1, 0] = torch.tensor([0.5, 0.6, 0.0])
    assert rank_parity.judge_tokens(one, far) == (3, 1, 1)


def test_parity_finds_ranks_that_are_wrong_or_apart(
    tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = parity.make_tiny_model("llama", tmp_path / "llama")
    seat = group.RankSeat(0, 1, tmp_path, small=True)
    part = group.load(seat, model_dir, torch.float32)
    group.load_adapters(part.model, parity.RANKS)
    one = rank_parity.answers(part.model, None)
    new = rank_parity.NUM_NEW_TOKENS
    assert one["chosen"].shape == (len(parity.LENGTHS), new)
    assert len(one["logits"]) == sum(parity.LENGTHS) + new * len(parity.LENGTHS)
    again = rank_parity.answers(part.model, one["chosen"])
    report.table("Errors", rank_parity._COLUMNS)
    assert rank_parity.compare(report, "llama", "float32", one, [again, again]) == []
    # With an adapter in another one's place.
    monkeypatch.setattr(parity, "SLOTS", (0, None, 2, 2, 0))
    other = rank_parity.answers(part.model, one["chosen"])
    found = rank_parity.compare(report, "llama", "float32", one, [other, again])
    assert any("from one rank's logits" in each for each in found)
    assert any("apart" in each for each in found)


def test_tokens_that_were_chosen_are_what_follows(tmp_path: Path) -> None:
    model_dir = parity.make_tiny_model("llama", tmp_path / "llama")
    part = group.load(group.RankSeat(0, 1, tmp_path, small=True), model_dir, torch.float32)
    group.load_adapters(part.model, parity.RANKS)
    free = rank_parity.answers(part.model, None)
    chosen = (free["chosen"] + 1) % part.model.vocab_size
    forced = rank_parity.answers(part.model, chosen)
    assert torch.equal(forced["chosen"], chosen)
    prompts = sum(parity.LENGTHS)
    assert torch.equal(forced["logits"][:prompts], free["logits"][:prompts])
    assert not torch.equal(forced["scores"][0], free["scores"][0])


def test_speed_is_told_over_the_quicker_of_one_rank(report: Report) -> None:
    report.table("Speed", speed._COLUMNS)
    case = speed.StepCase(8, 1, 512, 2)
    speed.add(report, case, {"eager": 0.010, "graph": 0.006}, {"eager": 0.004, "graph": None})
    (row,) = report.data["tables"][0]["rows"]
    assert row[:2] == ["decode, 8 rows at 512", 2]
    assert row[2:] == pytest.approx([10.0, 6.0, 4.0, 1.5])


def test_a_loss_is_wrong_if_noticed_late_or_if_streams_are_cut_or_changed(report: Report) -> None:
    report.table("Losses", failures._COLUMNS)
    asked = failures.SMALL.serving.load.output_tokens
    whole = HeardStream(list(range(asked)), [float(at) for at in range(asked)], "")
    other = whole._replace(ids=[7] * asked)
    cut = whole._replace(ids=whole.ids[:9], error="the server is shutting down")

    def wrong(noticed_s: float, *streams: HeardStream, small: bool = True) -> list[str]:
        figures = LossFigures(noticed_s, 30.0, list(streams))
        undisturbed = [whole] * len(streams)
        return failures.judge(report, "stopped", figures, undisturbed, failures.SMALL, small=small)

    assert wrong(12.0, whole, whole) == []
    assert wrong(60.0, whole) == ["stopped: noticed after 60 s of 25"]
    (said,) = wrong(12.0, whole, cut, small=False)
    assert said == "stopped: 1 streams did not end whole: the server is shutting down"
    assert wrong(12.0, other) == ["stopped: 1 streams have other tokens"]
    # On a GPU what is computed anew is rounded anew.
    assert wrong(12.0, other, small=False) == []
    assert report.data["tables"][0]["rows"][-1][-3:] == [1, 1, 0]
