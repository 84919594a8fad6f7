"""What prevents a start is said in one sentence, with a code, and nothing is left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.exit_codes import ExitCode

BIN = Path(sys.executable).parent
LIMIT_S = 100.0
# No network is ever reached: a hub id is looked for here, where nobody listens.
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Iterator[Path]:
    """Where the launcher makes its private folder; empty again at the end."""
    folder = Path("/tmp") / f"lorax-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    left = sorted(folder.iterdir())
    shutil.rmtree(folder)
    assert left == []


def run(program: str, *words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; output and error come as one text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": NOWHERE,
                   **settings.pop("environment", {})}  # fmt: skip
    return subprocess.run(
        [str(BIN / program), *words], env=environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False, **settings,
    )  # fmt: skip


def processes_with(text: str) -> list[str]:
    """Return the command lines of running processes that have ``text`` in their environment."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and text.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.fixture
def refusal(run_folder: Path) -> Callable[..., str]:
    """Start a launcher that must fail with a code; return its last line."""

    def start(code: ExitCode, *words: str, **settings: Any) -> str:
        environment = {"TMPDIR": str(run_folder), **settings.pop("environment", {})}
        bind = ("--hostname", "127.0.0.1", "--port", "0")
        done = run("lorax-launcher", *bind, *words, environment=environment, **settings)
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        assert "Ready" not in done.stdout
        assert processes_with(f"TMPDIR={run_folder}") == []
        return done.stdout.splitlines()[-1]

    return start


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def test_a_folder_that_does_not_exist(refusal: Callable[..., str]) -> None:
    last = refusal(ExitCode.MODEL_NOT_FOUND, "--model-id", "/no/such/folder")
    assert "there is no model at /no/such/folder. Check the path" in last


def test_a_hub_id_that_cannot_be_reached(refusal: Callable[..., str], tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    last = refusal(ExitCode.MODEL_NOT_FOUND, "--model-id", "nobody/nothing", environment=offline)
    assert "nobody/nothing" in last


def _no_family(folder: Path) -> None:
    edit_config(folder, model_type="no-such-family", architectures=["NoSuchForCausalLM"])


def _cut_weights(folder: Path) -> None:
    truncate(folder / "model.safetensors", 0.5)


def _noise_for_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    truncate(folder / "config.json", 0.5)


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (_no_family, ExitCode.MODEL_UNSUPPORTED, "'no-such-family' is unknown to transformers"),
        (_cut_weights, ExitCode.MODEL_CORRUPT, "model.safetensors"),
        (_noise_for_weights, ExitCode.MODEL_CORRUPT, "model.safetensors"),
        (_pickle_only, ExitCode.MODEL_UNSUPPORTED, "Convert them to safetensors"),
        (_no_tokenizer, ExitCode.TOKENIZER_UNUSABLE, "tokenizer.json"),
        (_broken_tokenizer, ExitCode.MODEL_CORRUPT, "tokenizer.json cannot be read"),
        (_no_config, ExitCode.MODEL_NOT_FOUND, "has no config.json"),
        (_broken_config, ExitCode.MODEL_CORRUPT, "config.json"),
    ],
)
def test_a_model_folder_that_cannot_be_served(
    refusal: Callable[..., str],
    folder: Path,
    damage: Callable[[Path], None],
    code: ExitCode,
    words: str,
) -> None:
    damage(folder)
    assert words in refusal(code, "--model-id", str(folder))


def test_a_port_in_use(refusal: Callable[..., str], llama: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        last = refusal(ExitCode.PORT_IN_USE, "--model-id", str(llama), "--port", port)
    assert f"--port {port} is in use on 127.0.0.1. Choose another --port" in last


def test_a_pool_too_small_for_one_request(refusal: Callable[..., str], llama: Path) -> None:
    words = ("--model-id", str(llama), "--num-blocks", "2", "--max-total-tokens", "200")
    last = refusal(ExitCode.BAD_CONFIG, *words)
    assert "--max-total-tokens: 200 does not fit the KV cache of 32 tokens" in last
    assert "choose at most 32" in last


@pytest.mark.parametrize("mebibytes", [500, 3000])
def test_too_little_memory(refusal: Callable[..., str], llama: Path, mebibytes: int) -> None:
    """Where it fails depends on the limit: while libraries load, or at warm-up."""
    if mebibytes > 500 and torch.version.cuda is not None:
        pytest.skip("the libraries of a CUDA build of torch alone map more than that")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes * 2**20, mebibytes * 2**20))

    last = refusal(ExitCode.OUT_OF_MEMORY, "--model-id", str(llama), preexec_fn=limit)
    assert "memory" in last


def test_a_socket_folder_that_does_not_exist(refusal: Callable[..., str], llama: Path) -> None:
    words = ("--model-id", str(llama), "--shard-uds-path", "/no/such/folder/shard")
    last = refusal(ExitCode.SOCKET_FAILED, *words)
    assert "unix:/no/such/folder/shard-0: its folder does not exist" in last


def test_a_cache_folder_that_cannot_be_made(
    refusal: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    # A folder below a file cannot be made by anybody, root included.
    (tmp_path / "file").write_text("")
    _no_tokenizer(folder)
    cache = str(tmp_path / "file" / "cache")
    last = refusal(ExitCode.FOLDER_UNUSABLE, "--model-id", str(folder), "--cache-dir", cache)
    assert "cannot be used: not a directory" in last
    assert "set LORAX_CACHE" in last


def test_a_backend_that_does_not_exist(refusal: Callable[..., str], llama: Path) -> None:
    words = ("--model-id", str(llama), "--attention-backend", "nothing")
    assert "'nothing'; choose auto" in refusal(ExitCode.BACKEND_UNAVAILABLE, *words)


@pytest.mark.parametrize(
    "words",
    [("--port", "99999"), ("--no-such-flag",), ("--num-shard", "0"), ("--quantize", "exl2"),
     ("--max-input-length", "10", "--max-total-tokens", "10"), ("--max-batch-size", "many")],
    ids=" ".join,
)  # fmt: skip
def test_bad_flags(words: tuple[str, ...]) -> None:
    done = run("lorax-launcher", *words)
    assert done.returncode == ExitCode.USAGE, done.stdout
    assert words[0] in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("program", ["lorax-router", "lorax-shard"])
@pytest.mark.parametrize("text", ["", "[]", '{"no_such_key": 1}', "\x00\xff"])
def test_a_bad_document_given_by_hand(program: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    verb = ("serve",) if program == "lorax-shard" else ()
    done = run(program, *verb, "--config", str(path))
    assert done.returncode == ExitCode.BAD_CONFIG, done.stdout
    assert "Traceback" not in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["hint"]
