"""What every child does at its start: it counts parts, and imports undisturbed."""

from __future__ import annotations

import gc

import pytest

from lorax_contract import process
from lorax_contract.start_clock import StartClock


def test_each_part_begins_where_the_last_one_ended() -> None:
    moments = iter([10.0, 10.5, 12.0, 12.25])
    clock = StartClock(lambda: next(moments))
    for part in ("imports", "weights", "imports"):
        clock.ended(part)
    assert clock.parts == {"imports": 0.75, "weights": 1.5}


def test_nobody_looks_for_garbage_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch):
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    with process.importing():
        assert not gc.isenabled()
        assert not frozen
    assert frozen == [False]
    assert gc.isenabled()


def test_garbage_is_looked_for_again_after_an_import_that_failed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gc, "freeze", lambda: None)
    with pytest.raises(ImportError), process.importing():
        raise ImportError("broken")
    assert gc.isenabled()
