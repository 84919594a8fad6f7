"""What the largest step takes is measured once, and again when anything is another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.helpers.toy_paged_model import BLOCK_SIZE, ToyModel, toy_tokenizer

from lorax_contract.step import WarmupSpec
from lorax_shard.engine import remembered_peak
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.engine.remembered_peak import RememberedPeak

SPEC = WarmupSpec(max_input_length=100, max_total_tokens=120, max_step_tokens=64, max_rows=8)
POOL = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=64)


class Start:
    """Engines that start one after the other with the same cache folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def tokens(self, spec: WarmupSpec = SPEC, pool: PoolSettings = POOL, *parts: object) -> int:
        """Warm an engine up; return how many tokens its largest pass computed."""
        model = ToyModel([])
        remembered = RememberedPeak(["toy", *parts], self._folder)
        engine = Engine(model, toy_tokenizer(), pool, remembered=remembered)
        engine.warm_up(spec)
        self.activations = dict(engine.memory.items)["activations"]
        return max(map(sum, model.passes))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    peaks = iter([5000, *[10] * 20])
    monkeypatch.setattr(
        "lorax_shard.engine.largest_step.measure_peak", lambda _, run: (run(), next(peaks))[1]
    )
    return Start(tmp_path)


def test_the_second_start_computes_a_small_step_and_plans_for_the_large_one(start: Start) -> None:
    assert start.tokens() == 64
    assert start.activations == 5000
    assert start.tokens() == 16
    assert start.activations == 5000


@pytest.mark.parametrize(
    "other",
    [
        (replace(SPEC, max_rows=9),),
        (SPEC, replace(POOL, max_adapter_rank=8)),
        (SPEC, POOL, "another backend"),
    ],
)
def test_another_step_pool_or_backend_is_measured(start: Start, other: tuple) -> None:
    start.tokens()
    assert start.tokens(*other) == 64


def test_another_code_or_environment_is_measured(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start.tokens()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    assert start.tokens() == 64
    monkeypatch.setattr(remembered_peak, "source_stamp", lambda: "edited")
    assert start.tokens() == 64


def test_code_that_is_edited_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered_peak, "_PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("1")
    before = remembered_peak.source_stamp()
    assert remembered_peak.source_stamp() == before
    (tmp_path / "a.py").write_text("12")
    assert remembered_peak.source_stamp() != before


@pytest.mark.parametrize("text", ["", "{}", '{"activations": -1}', '{"activations": "5"}', "[]"])
def test_a_file_that_says_nothing_is_measured_again(
    tmp_path: Path, start: Start, text: str
) -> None:
    start.tokens()
    (kept,) = tmp_path.iterdir()
    kept.write_text(text)
    assert start.tokens() == 64


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path, start: Start) -> None:
    blocked = Start(tmp_path / "file" / "folder")
    (tmp_path / "file").write_text("")
    assert blocked.tokens() == 64
    assert blocked.tokens() == 64
