"""The adapter of --merge-adapter-weights: fetched by the preparation, or refused in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tests.helpers.adapter_folders import WANTED, adapter_files, write_adapter
from tests.helpers.hub_stub import StubHub, running_hub

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.fetching.sources.environment import source_settings
from lorax_shard.fetching.sources.interface import SourceSettings
from lorax_shard.prepare.adapter import MergedAdapter, fetch_adapter
from lorax_shard.prepare.cli import prepare_command
from lorax_shard.prepare.files import ProgressEvent


def selection(tmp_path: Path, adapter_id: str, source: str, **changes: Any) -> MergedAdapter:
    values: dict[str, Any] = {
        "sources": SourceSettings(local_roots=(str(tmp_path / "local"),)),
        "store_dir": tmp_path / "store",
        "store_bytes": 1 << 20,
        "timeout_s": 60.0,
        **changes,
    }
    return MergedAdapter(adapter_id=adapter_id, source=source, **values)


def test_a_local_adapter_is_copied_into_the_store(tmp_path: Path) -> None:
    write_adapter(tmp_path / "local/poet", seed=3)
    events: list[ProgressEvent] = []
    folder = fetch_adapter(selection(tmp_path, "poet", "local"), events.append)
    assert folder.is_relative_to(tmp_path / "store")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.items() >= {name: adapter_files(3)[name] for name in WANTED}.items()
    assert events[-1].done == sum(len(adapter_files(3)[name]) for name in WANTED)
    events.clear()
    assert fetch_adapter(selection(tmp_path, "poet", "local"), events.append) == folder


def test_a_private_adapter_takes_the_operators_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with running_hub(StubHub({"org/secret": adapter_files()})) as hub:
        hub.private["org/secret"] = "hf_mine"
        asked = selection(
            tmp_path, "org/secret", "hub", sources=SourceSettings(hub_endpoint=hub.url)
        )
        assert "org/secret" in refusal(asked)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        assert (fetch_adapter(asked, lambda _event: None) / "adapter_config.json").is_file()


def refusal(asked: MergedAdapter) -> str:
    with pytest.raises(StartupError) as caught:
        fetch_adapter(asked, lambda _event: None)
    assert caught.value.exit_code is ExitCode.ADAPTER_UNUSABLE
    assert "--merge-adapter-weights" in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_had_is_said_in_words(tmp_path: Path) -> None:
    write_adapter(tmp_path / "local/poet", num_floats=5000)
    assert "is no folder" in refusal(selection(tmp_path, "nobody", "local"))
    assert "nowhere" in refusal(selection(tmp_path, "poet", "nowhere"))
    assert "no room" in refusal(selection(tmp_path, "poet", "local", store_bytes=1000))
    (tmp_path / "file").write_text("")
    blocked = selection(tmp_path, "poet", "local", store_dir=tmp_path / "file" / "store")
    assert "the adapter store" in refusal(blocked)


def test_the_command_reports_the_adapters_folder(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "tokenizer.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, model / "model.safetensors")
    write_adapter(tmp_path / "local/poet")
    words = ["--model-id", str(model), "--cache-dir", str(tmp_path / "cache")]
    adapter = ["--adapter-id", "poet", "--adapter-source", "local", "--adapter-local-root",
               str(tmp_path / "local")]  # fmt: skip
    assert prepared(words)["adapter_dir"] is None
    folder = Path(prepared([*words, *adapter])["adapter_dir"])
    assert folder.is_relative_to(tmp_path / "cache/adapters")
    assert (folder / "adapter_model.safetensors").is_file()
    done = CliRunner().invoke(prepare_command, [*words, "--adapter-id", "poet",
                                                "--adapter-source", "local"])  # fmt: skip
    assert done.exit_code == ExitCode.ADAPTER_UNUSABLE


def prepared(words: list[str]) -> dict[str, Any]:
    reader, writer = os.pipe()
    done = CliRunner().invoke(prepare_command, [*words, "--result-fd", str(writer)])
    assert done.exit_code == 0, done.output
    with os.fdopen(reader) as pipe:
        document: dict[str, Any] = json.loads(pipe.read())
    return document


def test_the_environment_names_the_hub_and_whose_token_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LORAX_USE_GLOBAL_HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://here:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_API_TOKEN", "hf_server")
    settings = source_settings(["/a"], ["s3://b"], "http://s3:9")
    assert settings == SourceSettings(
        local_roots=("/a",), hub_endpoint="http://here:9", offline=True, s3_roots=("s3://b",),
        s3_endpoint="http://s3:9",
    )  # fmt: skip
    monkeypatch.setenv("LORAX_USE_GLOBAL_HF_TOKEN", "1")
    assert source_settings([], [], None).server_token == "hf_server"
