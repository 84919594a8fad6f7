"""Kernels are compiled beside what takes time anyway, and never instead of it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from lorax_shard.prepare import cli, kernels
from lorax_shard.prepare.kernels import WorkBeside
from lorax_shard.prepare.prepare import PreparedModel, ProgressEvent


def test_work_that_began_is_waited_for_and_begins_once() -> None:
    done: list[str] = []
    may_end = threading.Event()

    def work() -> None:
        may_end.wait(60)
        done.append(threading.current_thread().name)

    beside = WorkBeside(work)
    beside.begin()
    beside.begin()
    assert not done
    may_end.set()
    beside.wait()
    assert done == ["kernels"]


def test_work_that_fails_is_left_to_whoever_needs_it() -> None:
    def work() -> None:
        raise OSError("no space is left")

    beside = WorkBeside(work)
    beside.begin()
    beside.wait()


@pytest.mark.parametrize(
    ("has_to_be_made", "options", "expected"),
    [(True, ["--compile-kernels"], 1), (False, ["--compile-kernels"], 0), (True, [], 0)],
)
def test_kernels_are_compiled_while_a_model_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    has_to_be_made: bool, options: list[str], expected: int,
) -> None:  # fmt: skip
    compiled: list[int] = []

    def prepare(model_id: str | None, *, progress, **_: object) -> PreparedModel:
        if has_to_be_made:
            progress(ProgressEvent("convert", 0, 2, "steps"))
            progress(ProgressEvent("convert", 2, 2, "steps"))
        return PreparedModel(
            model_id="tiny", model_dir=tmp_path, tokenizer_dir=tmp_path, revision=None
        )

    monkeypatch.setattr(kernels, "compile_kernels", lambda: compiled.append(1))
    monkeypatch.setattr(cli, "prepare", prepare)
    ran = CliRunner().invoke(cli.prepare_command, ["--cache-dir", str(tmp_path), *options])
    assert ran.exit_code == 0, ran.output
    assert len(compiled) == expected
