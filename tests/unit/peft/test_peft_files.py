"""Sizes, headers and tokenizer files, before anything is parsed as tensors."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.small_adapters import make_base, tensors, write

from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits, TensorInfo, find_text_files, read_header
from lorax_shard.peft.read import read_adapter


def refusal(folder: Path, limits: AdapterLimits | None = None) -> str:
    with pytest.raises(AdapterRefusedError) as caught:
        read_adapter(folder, make_base(), limits or AdapterLimits())
    return caught.value.public


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"max_config_bytes": 10}, r"adapter_config.json has \d+ bytes; the limit is 10$"),
        (
            {"max_weights_bytes": 100},
            r"adapter_model.safetensors has 3\d\d bytes; the limit is 100$",
        ),
        ({"max_header_bytes": 100}, r"has a header of 2\d\d bytes; the limit is 100$"),
        ({"max_tensors": 1}, "adapter_model.safetensors has 2 tensors; the limit is 1"),
        ({"max_rank": 1}, "has the rank 2; the limit is 1"),
        ({"max_text_bytes": 5}, "chat_template.jinja has 6 bytes; the limit is 5"),
        ({"max_template_bytes": 5}, "chat_template.jinja has 6 bytes; the limit is 5"),
        ({"max_tokenizer_bytes": 9}, "tokenizer.json has 10 bytes; the limit is 9"),
    ],
)
def test_each_limit_is_kept(limits: dict[str, int], text: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ a }}"[:6])
    # No tokenizer: it is refused for its size before it is read.
    (tmp_path / "tokenizer.json").write_text("[" * 10)
    assert re.search(text, refusal(tmp_path, AdapterLimits(**limits)))


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="max_rank must be at least 1"):
        AdapterLimits(max_rank=0)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "model.pkl"])
def test_pickles_are_refused_and_never_opened(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / name)
    (tmp_path / name).chmod(0)
    assert refusal(tmp_path) == (
        f"its weights are in {name}: pickle files are never loaded, because loading them can run "
        "code; save it as adapter_model.safetensors (safe_serialization=True)"
    )


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    (write(tmp_path) / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    assert read_adapter(tmp_path, make_base(), AdapterLimits()).modules


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_by_the_name_of_safetensors_is_refused_and_not_run(
    protocol: int, tmp_path: Path
) -> None:
    write(tmp_path)
    torch.save({"x": torch.ones(2)}, tmp_path / "adapter_model.safetensors", pickle_protocol=2)
    assert "adapter_model.safetensors is damaged" in refusal(tmp_path)
    trap = b"cos\nsystem\n(S'touch " + bytes(tmp_path / "ran") + b"'\ntR."
    head = b"" if protocol < 2 else bytes((0x80, protocol))
    (tmp_path / "adapter_model.safetensors").write_bytes(head + trap)
    assert "adapter_model.safetensors is damaged" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith("adapter_model.safetensors is missing")
    write(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert refusal(tmp_path).startswith("adapter_config.json is missing")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors.index.json").write_text("{}")
    assert refusal(tmp_path).startswith("its weights are split into several files")


def header_file(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_safetensors_writes_is_accepted(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors", AdapterLimits())
    assert {name: info.shape for name, info in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors().items()
    }
    path = header_file(tmp_path, {"x": entry([2, 0], 0, 0), "y": entry([], 0, 2, "BF16")}, b"ab")
    assert read_header(path, AdapterLimits())["y"] == TensorInfo("BF16", ())


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"{", "its header is not valid JSON"),
        (b"[" * 200_000, "its header is not valid JSON"),
        (b"[]", "its header is not a JSON object"),
        (b'{"x": 1, "x": 2}', "its header is not valid JSON"),
        ({"x": 3}, "in no known way"),
        ({"x": entry(["2"], 0, 8)}, "in no known way"),
        ({"x": entry([-1, -2], 0, 8)}, "in no known way"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "in no known way"),
        ({"x": entry([2], 0, True)}, "in no known way"),
        ({"x": entry([1 << 61, 1 << 61], 0, 8)}, "does not fit its shape"),
        ({"x": entry([1 << 70], 0, 8)}, "in no known way"),
        ({"x": entry([1] * 60, 0, 4)}, "does not fit its shape"),
        ({"x": entry([3], 0, 8)}, "does not fit its shape"),
        ({"x": entry([2], 8, 0)}, "does not fit its shape"),
        ({"x": entry([2], 0, 8), "y": entry([1], 4, 8)}, "overlap or leave gaps"),
        ({"x": entry([1], 4, 8)}, "overlap or leave gaps"),
        ({"x": entry([1], 0, 4)}, "do not end where the file ends"),
        ({"x": entry([4], 0, 16)}, "do not end where the file ends"),
        ({"x" * 600: entry([2], 0, 8)}, "is too long"),
        ({"x": entry([2], -8, 0)}, "in no known way"),
        ({"x": entry([2], 0, 1 << 63)}, "in no known way"),
        ({"x": entry([1 << 31, 1 << 31, 4], 0, 0)}, "does not fit its shape"),
        ({"x": entry([1 << 31, 1 << 31, 4, 1 << 31], 0, 8)}, "does not fit its shape"),
        (b'{"x": {"shape": [' + b"9" * 6000 + b"]}}", "its header is not valid JSON"),
        ({"x": entry([2], 0, 8), "y": entry([2], 0, 8)}, "overlap or leave gaps"),
    ],
)
def test_headers_that_lie(header: Any, text: str, tmp_path: Path) -> None:
    path = header_file(tmp_path, header, b"\0" * 8)
    with pytest.raises(AdapterRefusedError) as caught:
        read_header(path, AdapterLimits())
    assert caught.value.public.startswith("weights.safetensors is damaged: ")
    assert text in caught.value.public


@pytest.mark.parametrize("dtype", ["I8", "", None, 5, ["F32"], {"F32": 1}])
def test_types_that_are_none_are_refused(dtype: Any, tmp_path: Path) -> None:
    path = header_file(tmp_path, {"x": entry([2], 0, 8) | {"dtype": dtype}}, b"\0" * 8)
    with pytest.raises(AdapterRefusedError, match="tensor 'x' has the type"):
        read_header(path, AdapterLimits())


@pytest.mark.parametrize("length", [3, 1 << 20, (1 << 64) - 1])
def test_header_lengths_that_lie(length: int, tmp_path: Path) -> None:
    path = header_file(tmp_path, b"{}", length=length)
    with pytest.raises(AdapterRefusedError, match="is cut off"):
        read_header(path, AdapterLimits())


def test_an_empty_file_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\1\0")
    with pytest.raises(AdapterRefusedError, match="is cut off"):
        read_header(path, AdapterLimits())


@pytest.mark.parametrize(
    ("document", "count"),
    [
        ({"model": {"vocab": {"a": 0, "b": 7}}}, 8),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 30, "content": "<x>"}]}, 31),
        ({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": None}, 2),
        ({"model": {"vocab": {}}}, 0),
    ],
)
def test_tokens_are_counted(document: Any, count: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert find_text_files(tmp_path, AdapterLimits()).num_tokens == count


@pytest.mark.parametrize("text", ["", "[]", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}}'])
def test_a_damaged_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(AdapterRefusedError, match="tokenizer.json is damaged"):
        find_text_files(tmp_path, AdapterLimits())


def test_text_files_are_listed_with_their_content(tmp_path: Path) -> None:
    assert find_text_files(tmp_path, AdapterLimits()).files == ()
    (tmp_path / "chat_template.jinja").write_text("hello")
    (tmp_path / "README.md").write_text("not of interest")
    text = find_text_files(tmp_path, AdapterLimits())
    assert text.has_chat_template
    assert [(file.name, file.bytes) for file in text.files] == [("chat_template.jinja", 5)]
    assert text.files[0].sha256.startswith("2cf24dba5fb0")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1.0", "true", '"1"', "null", "[1]"])
def test_ids_that_are_no_whole_numbers_are_refused(tmp_path: Path, number: str) -> None:
    write(tmp_path)
    for text in (
        f'{{"model": {{"vocab": {{"a": {number}}}}}}}',
        f'{{"model": {{"vocab": {{}}}}, "added_tokens": [{{"id": {number}}}]}}',
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        assert refusal(tmp_path) == "tokenizer.json is damaged: it is no tokenizer"
