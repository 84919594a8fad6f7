"""A tiny GGUF file becomes a folder that transformers loads, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from tests.helpers.tiny_gguf import write_gguf
from tokenizers import Tokenizer

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.prepare.prepare import PreparedModel, ProgressEvent, prepare


def _prepare(path: Path, cache: Path, events: list[ProgressEvent]) -> PreparedModel:
    return prepare(
        str(path),
        revision=None,
        source="hub",
        cache_dir=cache,
        trust_remote_code=False,
        progress=events.append,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_is_converted_once_and_whole(tmp_path: Path, tied: bool) -> None:
    path, cache, events = tmp_path / "tiny.gguf", tmp_path / "cache", list[ProgressEvent]()
    tensors = write_gguf(path, tied=tied)
    prepared = _prepare(path, cache, events)
    folder = prepared.model_dir
    assert prepared.tokenizer_dir == folder
    assert prepared.model_id == str(path)
    assert {event.task for event in events} == {"checksum tiny.gguf", "convert tiny.gguf"}
    weights = load_file(folder / "model.safetensors")
    assert all(weight.dtype is torch.float32 for weight in weights.values())
    assert ("lm_head.weight" in weights) is not tied
    down = weights["model.layers.0.mlp.down_proj.weight"].numpy()
    assert np.array_equal(down, tensors["blk.0.ffn_down.weight"])
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["architectures"] == ["LlamaForCausalLM"]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2], "bos_token_id": 1}

    events.clear()
    assert _prepare(path, cache, events) == prepared
    assert not events
    _check_loads(folder)
    _check_tokenizer(folder)


def test_the_command_prints_nothing_but_log_lines(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    command = [sys.executable, "-m", "lorax_shard.prepare.cli", "--model-id", str(path)]
    command += ["--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert records[-1]["event"] == "prepared"
    steps = [each["done"] for each in records if each.get("unit") == "steps"]
    assert (steps[0], steps[-1]) == (0, 3)


def _check_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys"))


def _check_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("ab 12<|im_end|>").tokens == ["ab", "Ġ", "1", "2", "<|im_end|>"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["model_max_length"] == 64
    assert settings["chat_template"] == "{{ messages[0]['content'] }}"


def test_a_gguf_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, leave_out="blk.0.ffn_up.weight")
    with pytest.raises(StartupError, match="up_proj") as error:
        _prepare(path, tmp_path / "cache", [])
    assert error.value.exit_code is ExitCode.MODEL_CORRUPT
    assert not any(each.is_dir() for each in (tmp_path / "cache" / "models").iterdir())


def test_a_gguf_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StartupError) as error:
        _prepare(path, tmp_path / "cache", [])
    assert error.value.exit_code is ExitCode.MODEL_CORRUPT


def test_a_gguf_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(str(path), "martian")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StartupError, match=r"odd\.gguf") as error:
        _prepare(path, tmp_path / "cache", [])
    assert error.value.exit_code is ExitCode.MODEL_UNSUPPORTED
