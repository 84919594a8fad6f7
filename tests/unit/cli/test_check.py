"""``adapters check``: what is wrong with a folder is said without a server and without weights."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.tiny_models import make_tiny_model

from lorax_cli.cli import main
from lorax_contract.errors import StartupError
from lorax_shard.check import CheckReport, check, find_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's config and tokenizer; its weights are gone."""
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    return write_formula_adapter(model, tmp_path / "adapter", rank=4, seed=1)


def checked(folder: Path, model: Path) -> CheckReport:
    return check(folder, "tiny", model, max_rank=64)


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change the configuration; None takes an option out."""

    def spoil(folder: Path) -> None:
        path = folder / CONFIG
        document = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))

    return spoil


def retensor(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(data))


def void(_value: object) -> None:
    """Return nothing."""


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[first(tensors)]


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] = torch.zeros(4, 7)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)][0, 0] = float("nan")


def count(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] = tensors[first(tensors)].to(torch.int64)


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.somewhere.lora_A.weight"] = torch.zeros(4, 4)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), "adapter_config.json is missing"),
    "pickle": (pickled, "pickle files are never loaded"),
    "pointer": (
        write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "Git LFS",
    ),
    "no JSON": (write(CONFIG, b"{"), "adapter_config.json"),
    "no object": (write(CONFIG, b"[]"), "adapter_config.json"),
    "cut off": (cut, "is damaged"),
    "header bomb": (write(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"), "is damaged"),
    "another type": (edit(peft_type="IA3"), "peft_type 'IA3' is not supported"),
    "another task": (edit(task_type="QUESTION_ANS"), "task_type"),
    "no head": (edit(task_type="SEQ_CLS"), "it brings no weights for score"),
    "refused option": (edit(use_qalora=True), "use_qalora is not supported"),
    "unknown option": (edit(use_tomorrow=True), "use_tomorrow"),
    "rank of another": (edit(r=8), "rank"),
    "rank too large": (edit(r=100_000), "the limit is 64"),
    "targets nothing": (edit(target_modules=["nowhere"]), "nowhere"),
    "missing tensor": (retensor(drop), "weights are missing that adapter_config.json asks for"),
    "wrong shape": (retensor(widen), "shape"),
    "not a number": (retensor(poison), "NaN"),
    "integers": (retensor(count), "I64"),
    "one too many": (retensor(add), "somewhere"),
    "template too large": (write("chat_template.jinja", b"x" * (3 << 20)), "chat_template.jinja"),
    "broken tokenizer": (write("tokenizer.json", b"{"), "tokenizer.json"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_every_kind_of_broken_folder_gets_its_sentence(
    kind: str, model: Path, adapter: Path
) -> None:
    spoil, words = BROKEN[kind]
    spoil(adapter)
    report = checked(adapter, model)
    assert report.refusal is not None
    assert words in report.refusal
    assert "Traceback" not in report.refusal


def test_a_good_folder_is_served_and_its_options_are_explained(model: Path, adapter: Path) -> None:
    edit(lora_dropout=0.1, use_rslora=True, base_model_name_or_path="org/other")(adapter)
    report = checked(adapter, model)
    assert report.refusal is None
    assert (report.facts["max_rank"], report.facts["num_modules"]) == (4, 14)
    treated = {each["name"]: each["treatment"] for each in report.options}
    assert treated["use_rslora"] == "computed"
    assert treated["lora_dropout"] == "harmless"
    # What PEFT has anyway says nothing.
    assert "bias" not in treated
    assert any("org/other" in warning for warning in report.warnings)


def test_a_folder_that_is_not_there_is_said(model: Path, tmp_path: Path) -> None:
    assert checked(tmp_path / "none", model).refusal == f"there is no folder {tmp_path / 'none'}"


def test_an_adapter_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    other = make_tiny_model("llama", tmp_path / "other", hidden_size=60)
    folder = write_formula_adapter(other, tmp_path / "adapter", rank=4, seed=1)
    assert "shape" in str(checked(folder, model).refusal)


def test_a_path_without_a_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="there is no model at"):
        find_model(str(tmp_path / "none"), tmp_path)


def test_the_command_shows_it_and_its_code_tells(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    """Through the shard's program, as a person calls it."""
    made = make_tiny_model("llama", tmp_path / "whole")
    words = ["adapters", "check", str(adapter), "--model-id", str(made)]
    good = CliRunner().invoke(main, words)
    assert good.exit_code == 0, good.output
    assert good.output.startswith(f"served with {made}"[:12])
    assert "rank 4 on 14 modules" in good.output
    shutil.copy(adapter / CONFIG, tmp_path / "kept")
    edit(use_qalora=True)(adapter)
    bad = CliRunner().invoke(main, words)
    assert bad.exit_code == 1
    assert bad.output.startswith("refused: use_qalora is not supported")
    lost = CliRunner().invoke(main, [*words[:-1], str(tmp_path / "none")])
    assert lost.exit_code == 1
    assert "the model cannot be described: there is no model at" in lost.output
