"""``lorax-shard prepare`` against a stand-in for the hub, and the real default model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from tests.helpers.default_model import default_model_dir
from tests.helpers.hub_stub import COMMIT, StubHub, running_hub
from tokenizers import Tokenizer

from lorax_contract.exit_codes import ExitCode
from lorax_shard.prepare.default import DEFAULT_MODEL_ID

_WEIGHTS = save({"w": torch.arange(300_000, dtype=torch.float32)}, metadata={"format": "pt"})
_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": _WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "README.md": b"# read me",
    "modeling_custom.py": b"print('hello')",
    "onnx/config.json": b"{}",
    "consolidated.safetensors": b"twice",
}


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with running_hub(StubHub(repositories={"org/model": dict(_FILES)})) as stub:
        yield stub


def _run(hub: StubHub, tmp_path: Path, *arguments: str, **env: str) -> tuple[int, list[Any], Any]:
    """Run the command; return its exit code, its log records and its result."""
    reading, writing = os.pipe()
    unset = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN", "HF_HUB_OFFLINE")
    process = subprocess.run(
        [sys.executable, "-m", "lorax_shard.prepare.cli", "--result-fd", str(writing)]
        + ["--cache-dir", str(tmp_path / "cache"), *arguments],
        env={
            **{key: value for key, value in os.environ.items() if key not in unset},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
            "HF_HUB_ETAG_TIMEOUT": "5",
            **env,
        },
        pass_fds=(writing,),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    assert process.stderr == ""
    records = [json.loads(line) for line in process.stdout.splitlines()]
    return process.returncode, records, json.loads(text) if text else None


def _error(records: list[Any]) -> str:
    (message,) = [each["message"] for each in records if each["level"] == "error"]
    return str(message)


def test_a_hub_model_is_fetched_without_pickles_and_kept(hub: StubHub, tmp_path: Path) -> None:
    code, records, result = _run(hub, tmp_path, "--model-id", "org/model")
    assert code == 0, records
    assert result["model_id"] == "org/model"
    assert result["revision"] == COMMIT
    folder = Path(result["model_dir"])
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == _WEIGHTS
    progress = [each for each in records if each.get("event") == "progress"]
    assert {"task", "done", "total", "unit"} <= progress[-1].keys()
    assert max(each["done"] for each in progress) >= len(_WEIGHTS)
    hub.requests.clear()
    assert _run(hub, tmp_path, "--model-id", "org/model")[2] == result
    assert hub.downloads() == []


def test_a_fetched_model_serves_offline_and_without_network(hub: StubHub, tmp_path: Path) -> None:
    _, _, result = _run(hub, tmp_path, "--model-id", "org/model")
    hub.requests.clear()
    code, _, offline = _run(hub, tmp_path, "--model-id", "org/model", HF_HUB_OFFLINE="1")
    assert (code, offline) == (0, result)
    assert hub.requests == []
    code, _, unreachable = _run(
        hub, tmp_path, "--model-id", "org/model", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert (code, unreachable) == (0, result)


def test_a_revision_goes_with_the_name_or_its_option(hub: StubHub, tmp_path: Path) -> None:
    for arguments in (["org/model@main"], ["org/model", "--revision", COMMIT]):
        code, records, result = _run(hub, tmp_path, "--model-id", *arguments)
        assert code == 0, records
        assert (result["model_id"], result["revision"]) == ("org/model", COMMIT)
    code, records, _ = _run(hub, tmp_path, "--model-id", "org/model@v9")
    assert code == ExitCode.MODEL_NOT_FOUND
    assert "no such revision" in _error(records)


def test_a_broken_transfer_goes_on_where_it_stopped(hub: StubHub, tmp_path: Path) -> None:
    # The client writes in pieces of 10 MB and goes on after the last whole one.
    weights = save({"w": torch.arange(6_000_000, dtype=torch.float32)})
    hub.repositories["org/model"]["model.safetensors"] = weights
    hub.breaks_once.add("model.safetensors")
    code, records, result = _run(hub, tmp_path, "--model-id", "org/model")
    assert code == 0, records
    assert (Path(result["model_dir"]) / "model.safetensors").read_bytes() == weights
    assert len(hub.ranges) == 1
    assert not hub.ranges[0].startswith("bytes=0-")


def test_an_unknown_name(hub: StubHub, tmp_path: Path) -> None:
    code, records, result = _run(hub, tmp_path, "--model-id", "org/typo")
    assert code == ExitCode.MODEL_NOT_FOUND
    assert "org/typo" in _error(records)
    assert "Check the spelling" in _error(records)
    assert result is None


def test_a_private_model_needs_its_token(hub: StubHub, tmp_path: Path) -> None:
    hub.private["org/model"] = "hf_right"
    code, records, _ = _run(hub, tmp_path, "--model-id", "org/model")
    assert code == ExitCode.MODEL_NOT_FOUND
    assert "HF_TOKEN" in _error(records)
    code, records, _ = _run(hub, tmp_path, "--model-id", "org/model", HF_TOKEN="hf_wrong")
    assert code == ExitCode.MODEL_NOT_FOUND
    assert "hf_wrong" not in json.dumps(records)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"):
        code, records, _ = _run(hub, tmp_path, "--model-id", "org/model", **{name: "hf_right"})
        assert code == 0, records
        assert "hf_right" not in json.dumps(records)


def test_a_gated_model_says_what_to_accept(hub: StubHub, tmp_path: Path) -> None:
    hub.gated.add("org/model")
    code, records, _ = _run(hub, tmp_path, "--model-id", "org/model", HF_TOKEN="hf_x")
    assert code == ExitCode.MODEL_NOT_FOUND
    assert "gated" in _error(records)
    assert f"{hub.url}/org/model" in _error(records)


def test_a_hub_in_trouble_and_no_hub(hub: StubHub, tmp_path: Path) -> None:
    hub.failing_with = 500
    code, records, _ = _run(hub, tmp_path, "--model-id", "org/model")
    assert code == ExitCode.MODEL_NOT_FOUND
    assert "local folder" in _error(records)
    code, records, _ = _run(
        hub, tmp_path, "--model-id", "org/model", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert code == ExitCode.MODEL_NOT_FOUND
    assert "network" in _error(records)


def test_offline_with_an_empty_cache(hub: StubHub, tmp_path: Path) -> None:
    code, records, _ = _run(hub, tmp_path, "--model-id", "org/model", HF_HUB_OFFLINE="1")
    assert code == ExitCode.MODEL_NOT_FOUND
    assert "HF_HUB_OFFLINE" in _error(records)
    assert hub.requests == []


def test_a_repository_without_safetensors(hub: StubHub, tmp_path: Path) -> None:
    for name in ("model.safetensors", "consolidated.safetensors"):
        del hub.repositories["org/model"][name]
    code, records, _ = _run(hub, tmp_path, "--model-id", "org/model")
    assert code == ExitCode.MODEL_NOT_FOUND
    assert "safetensors" in _error(records)
    assert "pytorch_model.bin" not in hub.downloads()


def test_the_default_model_is_whole(tmp_path: Path) -> None:
    folder = default_model_dir()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert "lm_head.weight" not in names
        assert len(names) == 272
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
        assert weights.get_slice("model.embed_tokens.weight").get_dtype() == "F32"


def test_the_default_tokenizer_is_the_models_own() -> None:
    folder = default_model_dir()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("hi there").tokens == ["hi", "Ġthere"]
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    text = "<|im_start|>user\nHi<|im_end|>\n"
    ids = tokenizer.encode(text).ids
    assert (ids[0], ids[-2]) == (1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "user\nHi\n"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == "<|im_start|>"
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["model_max_length"] == 8192
    assert "<|im_start|>assistant\n" in settings["chat_template"]


def test_the_default_model_is_reused_by_the_command(tmp_path: Path) -> None:
    folder = default_model_dir()
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "lorax_shard.prepare.cli", "--result-fd", str(writing)]
    command += ["--cache-dir", str(folder.parent.parent)]
    subprocess.run(command, pass_fds=(writing,), check=True, capture_output=True, timeout=60)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = json.loads(pipe.read())
    assert result["model_id"] == DEFAULT_MODEL_ID
    assert Path(result["model_dir"]) == folder
