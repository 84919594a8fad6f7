"""An adapter's own tokenizer: its tokens are taken, another way of reading text is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import tiny_tokenizers
from tests.helpers.small_adapters import QUERY, config, make_base, tensors, write
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

from lorax_shard.peft.context import make_context
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.tokenizer import is_bases, read_tokenizer
from lorax_shard.peft.verify import verify
from lorax_shard.vocabulary import read_vocabulary


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.json"
    tiny_tokenizers.byte_level().save(str(path))
    return path


def folder_with(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_an_adapter_without_a_tokenizer_has_the_bases_tokens(tmp_path: Path, base: Path) -> None:
    assert read_tokenizer(tmp_path, base) is None


def test_other_tokens_are_taken(tmp_path: Path, base: Path) -> None:
    own = copy.deepcopy(tiny_tokenizers.byte_level())
    own.add_special_tokens(["<own>"])
    vocabulary = read_tokenizer(folder_with(tmp_path / "own", own), base)
    assert vocabulary is not None
    assert vocabulary.token(own.token_to_id("<own>")) == "<own>"
    assert vocabulary.is_special(own.token_to_id("<own>"))


def change(folder: Path, part: str, value: Any) -> None:
    """Write one rule anew; the library would apply a normalizer to the added tokens at once."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document[part] = json.loads(value.__getstate__())
    path.write_text(json.dumps(document))


BOMB = normalizers.Sequence([normalizers.Replace("a", "a" * 1000)] * 3)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("normalizer", BOMB, "another normalizer"),
        ("pre_tokenizer", pre_tokenizers.Whitespace(), "another pre-tokenizer"),
        ("decoder", decoders.Replace("a", "a" * 1000), "another decoder"),
    ],
)
def test_whatever_else_differs_is_refused_by_name(
    tmp_path: Path, base: Path, part: str, value: Any, words: str
) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    change(folder, part, value)
    with pytest.raises(AdapterRefusedError, match=words):
        read_tokenizer(folder, base)


def test_an_older_spelling_of_the_same_rules_is_the_same(tmp_path: Path, base: Path) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    document = json.loads((folder / "tokenizer.json").read_text())
    assert document["pre_tokenizer"].pop("use_regex") is True
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert read_tokenizer(folder, base) is not None


def test_what_changes_no_text_and_no_token_is_no_other_rule(tmp_path: Path, base: Path) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    document = json.loads((folder / "tokenizer.json").read_text())
    document["pre_tokenizer"]["trim_offsets"] ^= True
    for flag in ("trim_offsets", "add_prefix_space", "use_regex"):
        document["decoder"][flag] ^= True
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert read_tokenizer(folder, base) is not None
    document["pre_tokenizer"]["add_prefix_space"] ^= True
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(AdapterRefusedError, match="another pre-tokenizer"):
        read_tokenizer(folder, base)


def test_the_bases_tokenizer_is_known_however_it_was_saved(tmp_path: Path, base: Path) -> None:
    own = copy.deepcopy(tiny_tokenizers.byte_level())
    own.enable_truncation(7)
    own.enable_padding()
    folder = folder_with(tmp_path / "own", own)
    assert is_bases(folder, base)
    assert not is_bases(folder, None)
    assert not is_bases(tmp_path, base)
    document = json.loads((folder / "tokenizer.json").read_text())
    merges = document["model"]["merges"]
    # As earlier releases wrote them.
    document["model"]["merges"] = [" ".join(pair) for pair in merges]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert is_bases(folder, base)
    document["model"]["merges"] = merges[:-1]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert not is_bases(folder, base)


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"model": {"type": "BPE"}}', b"\xff"])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, base: Path, raw: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(AdapterRefusedError, match="cannot be read|another pre-tokenizer"):
        read_tokenizer(tmp_path, base)


@pytest.mark.parametrize(
    ("document", "ends"),
    [
        ({"eos_token": "<|end|>"}, 1),
        ({"eos_token": {"content": "<|end|>"}}, 1),
        ({"eos_token": "<nowhere>"}, 0),
        ({"eos_token": 5}, 0),
        ([], 0),
    ],
)
def test_the_end_of_its_texts_is_what_its_configuration_says(
    tmp_path: Path, base: Path, document: Any, ends: int
) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    (folder / "tokenizer_config.json").write_text(json.dumps(document))
    vocabulary = read_tokenizer(folder, base)
    assert vocabulary is not None
    assert len(vocabulary.end_ids) == ends


def test_what_is_verified_brings_its_tokens_along(tmp_path: Path, base: Path) -> None:
    folder = write(tmp_path / "adapter", config(r=2), tensors(QUERY, rank=2))
    target = tmp_path / "normal"
    target.mkdir()
    context = make_context(make_base(), AdapterLimits(), tokenizer=base)
    verify(folder, target, context)
    assert read_vocabulary(target) is None
    own = copy.deepcopy(tiny_tokenizers.byte_level())
    own.save(str(folder / "tokenizer.json"))
    verify(folder, target, context)
    vocabulary = read_vocabulary(target)
    assert vocabulary is not None
    assert len(vocabulary) == own.get_vocab_size()
    change(folder, "normalizer", BOMB)
    with pytest.raises(AdapterRefusedError, match="another normalizer"):
        verify(folder, target, context)
