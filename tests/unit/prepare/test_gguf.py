"""A tiny GGUF file becomes a folder that transformers loads, whole or not at all."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFEndian, GGUFWriter
from safetensors.torch import load_file
from tests.helpers.tiny_gguf import write_gguf
from tokenizers import Tokenizer

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.prepare.file_head import check_head
from lorax_shard.prepare.gguf import read_facts
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


def _patched(path: Path, name: bytes, offset: int, piece: bytes) -> Path:
    """Write a small model with other bytes behind a name in it."""
    write_gguf(path)
    raw = bytearray(path.read_bytes())
    place = raw.index(name) + len(name) + offset
    raw[place : place + len(piece)] = piece
    path.write_bytes(raw)
    return path


# Behind a name lies the type of its value; of a list the type of its items and their number.
@pytest.mark.parametrize(
    ("name", "offset", "piece", "words"),
    [
        (b"tokenizer.ggml.token_type", 8, struct.pack("<Q", 1 << 60), "a length in it is wrong"),
        (b"tokenizer.ggml.tokens", 8, struct.pack("<Q", 1 << 60), "a length in it is wrong"),
        (b"general.architecture", 4, struct.pack("<Q", 1 << 63), "a length in it is wrong"),
        (b"llama.block_count", 0, struct.pack("<I", 99), "of the type 99"),
        (b"llama.block_count", 4, struct.pack("<I", 2**32 - 1), "block_count is 4294967295"),
        (b"llama.embedding_length", 4, struct.pack("<I", 2**31), "embedding_length is 2147483648"),
        (b"blk.0.attn_q.weight", 0, struct.pack("<I", 2**31), "2147483648 dimensions"),
        (b"tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 2**31), "IndexError"),
    ],
)
def test_a_head_that_lies_is_refused_at_once(
    name: bytes, offset: int, piece: bytes, words: str, tmp_path: Path
) -> None:
    path = _patched(tmp_path / "tiny.gguf", name, offset, piece)
    with pytest.raises(StartupError, match=words) as error:
        _prepare(path, tmp_path / "cache", [])
    assert error.value.exit_code is ExitCode.MODEL_CORRUPT


@pytest.mark.parametrize(
    "raw", [b"", b"GG", b"PK\x03\x04" * 9, b"GGUF" + b"\x09\0\0\0" + b"\0" * 16]
)
def test_what_is_no_gguf_is_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(raw)
    with pytest.raises(StartupError, match="is not a whole GGUF file") as error:
        read_facts(path)
    assert error.value.exit_code is ExitCode.MODEL_CORRUPT


def test_the_other_order_of_bytes_is_walked_too(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(str(path), "llama", endianess=GGUFEndian.BIG)
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([1.0, 2.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    check_head(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cut off"):
        check_head(path)


def test_a_shape_that_transformers_does_not_take_is_refused_in_words(tmp_path: Path) -> None:
    name = b"llama.attention.head_count"
    path = _patched(tmp_path / "tiny.gguf", name, 4, struct.pack("<I", 1000))
    with pytest.raises(StartupError, match="transformers cannot read the tokenizer of") as error:
        _prepare(path, tmp_path / "cache", [])
    assert error.value.exit_code is ExitCode.MODEL_UNSUPPORTED
