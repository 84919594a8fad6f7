"""What `auto` measured is kept, and measured again whenever it may not hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from lorax_shard.linear import install, remembered, replace
from lorax_shard.linear import measure as measure_module
from lorax_shard.linear.backends import OneDnnBackend, TorchBackend
from lorax_shard.linear.measure import ROWS, Table
from lorax_shard.linear.registry import BACKENDS

CPU = torch.device("cpu")
MEASURED = [OneDnnBackend(), TorchBackend()]
FIGURES: Table = {
    "onednn": (1.0,) * len(ROWS),
    "torch": (2.0,) * len(ROWS),
    "panel": (3.0,) * len(ROWS),
    "tiles": (3.0,) * len(ROWS),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of weights of each measurement that is made."""
    calls: list[int] = []

    def measure(weights: Sequence[torch.Tensor], backends: object) -> Table:
        calls.append(len(weights))
        return FIGURES

    monkeypatch.setattr(measure_module, "measure", measure)
    # Nobody else is there, whatever the machine that runs these tests does meanwhile.
    monkeypatch.setattr(measure_module, "_preemptions", lambda: 0)
    monkeypatch.setattr(replace, "_WORTH_KEEPING_S", 0.0)
    return calls


def model_of(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, 8, bias=False) for width in widths))


def test_the_second_start_measures_nothing(measured: list[int]) -> None:
    assert [install(model_of(8, 16), "auto", CPU).backend for _ in range(3)] == ["onednn"] * 3
    assert measured == [2]


@pytest.mark.parametrize("fastest", sorted(FIGURES))
def test_auto_takes_the_fastest_of_all_that_run(
    fastest: str, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if (reason := BACKENDS.probe(fastest, CPU, torch.float32)) is not None:
        pytest.skip(reason)
    if fastest == "panel" and BACKENDS.probe("tiles", CPU, torch.float32) is None:
        pytest.skip("tiles do what panels do, and are measured in their place")
    monkeypatch.setitem(FIGURES, fastest, (0.5,) * len(ROWS))
    assert install(model_of(8, 16), "auto", CPU).backend == fastest


def test_a_quick_measurement_is_not_kept(cache: Path) -> None:
    install(model_of(8), "auto", CPU)
    assert not (cache / "linears").exists()


def test_other_shapes_are_measured(measured: list[int]) -> None:
    for widths in ((8,), (16,), (8, 8)):
        install(model_of(*widths), "auto", CPU)
    assert measured == [1, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        ("lorax_shard.linear.remembered.cpu_identity", lambda: ["another cpu"]),
        ("torch.__version__", "9.9"),
        ("torch.get_num_threads", lambda: 77),
    ],
    ids=lambda change: change[0],
)
def test_figures_of_another_machine_do_not_count(
    change: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [torch.zeros(4, 4)]
    before = remembered.table_path(weights, MEASURED)
    assert remembered.table_path(weights, MEASURED) == before
    monkeypatch.setattr(*change)
    assert remembered.table_path(weights, MEASURED) != before


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"onednn": [1, 2, 3, 4]}', '{"onednn": [1], "torch": [2]}',
     '{"onednn": [1, 1, 1, 0], "torch": [2, 2, 2, 2]}', '{"onednn": "x", "torch": "y"}',
     '{"ms": {"onednn": [1, 1, 1, 1]}, "is_sure": true}', '{"ms": [], "is_sure": true}'],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(text: str, measured: list[int], cache: Path) -> None:
    install(model_of(8), "auto", CPU)
    (file,) = (cache / "linears").iterdir()
    file.write_text(text)
    install(model_of(8), "auto", CPU)
    assert measured == [1, 1]
    kept = remembered.recall(file, MEASURED)
    assert kept == ({each.name: FIGURES[each.name] for each in MEASURED}, True)


DISTURBED = {"onednn": (9.0, 0.5, 0.6, 0.7), "torch": (0.4, 0.5, 0.6, 0.7)}


def test_figures_that_a_busy_machine_has_disturbed_are_measured_again(
    measured: list[int], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was better is kept as long as nothing better is known."""
    preempted = iter(range(0, 1_000_000, 1_000))
    monkeypatch.setattr(measure_module, "_preemptions", lambda: next(preempted))
    install(model_of(8), "auto", CPU)
    (file,) = (cache / "linears").iterdir()
    kept = remembered.recall(file, MEASURED)
    assert kept is not None and not kept.is_sure
    remembered.remember(file, FIGURES | DISTURBED, is_sure=False)
    install(model_of(8), "auto", CPU)
    assert measured == [1, 1]
    best = DISTURBED | {"onednn": (1.0, 0.5, 0.6, 0.7)}
    assert remembered.recall(file, MEASURED) == (best, False)
    monkeypatch.setattr(measure_module, "_preemptions", lambda: 0)
    install(model_of(8), "auto", CPU)
    kept = remembered.recall(file, MEASURED)
    assert kept is not None and kept.is_sure and kept.table["torch"] == FIGURES["torch"]
    install(model_of(8), "auto", CPU)
    assert measured == [1, 1, 1]


def test_eight_rows_that_take_less_than_one_are_not_believed(
    measured: list[int], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, figures in DISTURBED.items():
        monkeypatch.setitem(FIGURES, name, figures)
    install(model_of(8), "auto", CPU)
    install(model_of(8), "auto", CPU)
    assert measured == [1, 1]


@pytest.mark.skipif(
    BACKENDS.probe("panel", CPU, torch.float32) is not None, reason="there is no kernel of our own"
)
def test_a_library_must_be_worth_that_passes_are_no_programs(
    measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "panel" if BACKENDS.probe("tiles", CPU, torch.float32) is not None else "tiles"
    monkeypatch.setitem(FIGURES, own, (1.2,) * len(ROWS))
    assert install(model_of(8), "auto", CPU).backend == own


def test_a_cache_that_cannot_be_written_costs_the_time_only(
    measured: list[int], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "linears").write_text("a file where the folder should be")
    assert install(model_of(8), "auto", CPU).backend == "onednn"
    assert install(model_of(8), "auto", CPU).backend == "onednn"
    assert len(measured) == 2
    assert "measured again" in caplog.text
