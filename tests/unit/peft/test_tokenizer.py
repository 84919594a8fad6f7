"""An adapter's own tokenizer: its tokens are taken, another way of reading text is refused."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import tiny_tokenizers
from tests.helpers.small_adapters import QUERY, config, make_base, tensors, write
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors

from lorax_shard.peft.context import make_context
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.tokenizer import read_tokenizer
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
    read = read_tokenizer(folder_with(tmp_path / "own", own), base)
    assert read is not None
    assert not read.is_base
    vocabulary = read.vocabulary
    assert vocabulary.token(own.token_to_id("<own>")) == "<own>"
    assert vocabulary.is_special(own.token_to_id("<own>"))


def change(folder: Path, part: str, value: Any) -> None:
    """Write one rule anew; the library would apply a normalizer to the added tokens at once."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document[part] = json.loads(value.__getstate__())
    path.write_text(json.dumps(document))


ROBERTA = processors.RobertaProcessing(("<|end|>", 0), ("<|end|>", 0))
BOMB = normalizers.Sequence([normalizers.Replace("a", "a" * 1000)] * 3)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("normalizer", BOMB, "another normalizer"),
        ("pre_tokenizer", pre_tokenizers.Whitespace(), "another pre-tokenizer"),
        ("decoder", decoders.Replace("a", "a" * 1000), "another decoder"),
        ("post_processor", ROBERTA, "another post-processor"),
    ],
)
def test_whatever_else_differs_is_refused_by_name(
    tmp_path: Path, base: Path, part: str, value: Any, words: str
) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    change(folder, part, value)
    with pytest.raises(AdapterRefusedError, match=words):
        read_tokenizer(folder, base)


@contextlib.contextmanager
def changed(folder: Path) -> Iterator[dict[str, Any]]:
    """Change what is in a folder's tokenizer.json."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    yield document
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("dropout", 0.5, r"`model.dropout` 0.5, unlike the base"),
        ("type", "WordPiece", "`model.type` 'WordPiece'"),
        ("byte_fallback", True, "`model.byte_fallback` True"),
        ("end_of_word_suffix", "</w>", "`model.end_of_word_suffix` '</w>'"),
        ("something_new", 1, "`model.something_new` 1"),
    ],
)
def test_another_way_to_join_tokens_is_refused_by_name(
    tmp_path: Path, base: Path, name: str, value: Any, words: str
) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    with changed(folder) as document:
        document["model"][name] = value
    with pytest.raises(AdapterRefusedError, match=words):
        read_tokenizer(folder, base)


def test_a_copy_of_the_bases_is_the_bases(tmp_path: Path, base: Path) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    read = read_tokenizer(folder, base)
    assert read is not None
    assert read.is_base
    # Nobody's affair here: how long texts may be, how they are filled up.
    own = copy.deepcopy(tiny_tokenizers.byte_level())
    own.enable_truncation(7)
    own.enable_padding()
    own.save(str(folder / "tokenizer.json"))
    read = read_tokenizer(folder, base)
    assert read is not None
    assert read.is_base
    without = read_tokenizer(folder, None)
    assert without is not None
    assert not without.is_base


def test_other_merges_are_other_tokens(tmp_path: Path, base: Path) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    with changed(folder) as document:
        document["model"]["merges"].pop()
    read = read_tokenizer(folder, base)
    assert read is not None
    assert not read.is_base


def test_a_post_processor_that_adds_no_token_changes_nothing(tmp_path: Path, base: Path) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    change(folder, "post_processor", processors.ByteLevel(trim_offsets=True))
    read = read_tokenizer(folder, base)
    assert read is not None
    assert read.is_base
    steps = [processors.ByteLevel(), processors.Sequence([processors.ByteLevel()])]
    change(folder, "post_processor", processors.Sequence(steps))
    read = read_tokenizer(folder, base)
    assert read is not None
    assert read.is_base
    change(folder, "post_processor", processors.Sequence([*steps, ROBERTA]))
    with pytest.raises(AdapterRefusedError, match="another post-processor"):
        read_tokenizer(folder, base)


def test_an_older_spelling_of_the_same_tokenizer_is_the_bases(tmp_path: Path, base: Path) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    with changed(folder) as document:
        assert document["pre_tokenizer"].pop("use_regex") is True
        model = document["model"]
        model["merges"] = [" ".join(each) for each in model["merges"]]
        assert model.pop("ignore_merges") is False
        model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    read = read_tokenizer(folder, base)
    assert read is not None
    assert read.is_base


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized", "special"])
def test_added_tokens_may_be_found_otherwise(tmp_path: Path, base: Path, flag: str) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    with changed(folder) as document:
        document["added_tokens"][0][flag] ^= True
    read = read_tokenizer(folder, base)
    assert read is not None
    assert not read.is_base


def added(number: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"id": number, "content": content, **flags}


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([added(600 + n, f"<{n}>") for n in range(33_000)], "adds 33003 tokens; the limit is"),
        ([added(600 + n, f"{n:0900}") for n in range(1200)], "of 1048576 characters together"),
        ([added(600, "a" * 1025)], "has a token of 1025 characters, 'aaa.*; the limit is 1024"),
        ([added(4_000_000_000, "<far>")], "a token with the id 4000000000"),
    ],
)
def test_too_many_and_too_long_tokens_are_refused(
    tmp_path: Path, base: Path, tokens: list[dict[str, Any]], words: str
) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    with changed(folder) as document:
        document["added_tokens"] += tokens
    with pytest.raises(AdapterRefusedError, match=words) as caught:
        read_tokenizer(folder, base, num_rows=600)
    assert len(str(caught.value)) < 500


def test_a_token_that_is_too_long_is_refused_in_the_vocabulary_too(
    tmp_path: Path, base: Path
) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    with changed(folder) as document:
        document["model"]["vocab"]["b" * 2000] = 700
    with pytest.raises(AdapterRefusedError, match="a token of 2000 characters"):
        read_tokenizer(folder, base)


def test_a_token_that_nobody_trained_is_no_fault(tmp_path: Path, base: Path) -> None:
    own = copy.deepcopy(tiny_tokenizers.byte_level())
    own.add_special_tokens(["<pad>"])
    num_rows = tiny_tokenizers.byte_level().get_vocab_size()
    assert read_tokenizer(folder_with(tmp_path / "own", own), base, num_rows) is not None


@pytest.mark.parametrize(
    "kind", ["byte_level", "byte_fallback", "unigram", "word_piece", "end_of_word"]
)
def test_every_kind_is_compared_with_itself(tmp_path: Path, kind: str) -> None:
    made = getattr(tiny_tokenizers, kind)()
    path = tmp_path / "base.json"
    made.save(str(path))
    folder = folder_with(tmp_path / "own", made)
    read = read_tokenizer(folder, path)
    assert read is not None
    assert read.is_base
    with changed(folder) as document:
        document["added_tokens"].append(added(made.get_vocab_size(), "<own>"))
    read = read_tokenizer(folder, path)
    assert read is not None
    assert not read.is_base


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


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"model": {"type": "BPE"}}', b"\xff"])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, base: Path, raw: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(
        AdapterRefusedError, match="cannot be read|another pre-tokenizer|it is no tokenizer"
    ):
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
    read = read_tokenizer(folder, base)
    assert read is not None
    assert len(read.vocabulary.end_ids) == ends


def test_what_is_verified_brings_its_tokens_along(tmp_path: Path, base: Path) -> None:
    folder = write(tmp_path / "adapter", config(r=2), tensors(QUERY, rank=2))
    target = tmp_path / "normal"
    target.mkdir()
    context = make_context(make_base(), AdapterLimits(), tokenizer=base)
    verify(folder, target, context)
    assert read_vocabulary(target) is None
    own = copy.deepcopy(tiny_tokenizers.byte_level())
    own.save(str(folder / "tokenizer.json"))
    # The router reads the base's, where it is the same.
    assert verify(folder, target, context)["is_bases_tokenizer"]
    own.add_special_tokens(["<own>"])
    own.save(str(folder / "tokenizer.json"))
    assert not verify(folder, target, context)["is_bases_tokenizer"]
    vocabulary = read_vocabulary(target)
    assert vocabulary is not None
    assert len(vocabulary) == own.get_vocab_size()
    change(folder, "normalizer", BOMB)
    with pytest.raises(AdapterRefusedError, match="another normalizer"):
        verify(folder, target, context)


@pytest.mark.parametrize("token_id", [2**31, 2**32 - 1])
def test_an_id_that_is_far_beyond_is_refused_where_an_added_token_hides_it(
    tmp_path: Path, base: Path, token_id: int
) -> None:
    folder = folder_with(tmp_path / "own", tiny_tokenizers.byte_level())
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"][tiny_tokenizers.EOS] = token_id
    assert tiny_tokenizers.EOS in [each["content"] for each in document["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(AdapterRefusedError, match=f"a token with the id {token_id}, far beyond"):
        read_tokenizer(folder, base)


def test_what_makes_the_library_panic_is_refused(tmp_path: Path) -> None:
    kind = tiny_tokenizers.end_of_word()
    folder = folder_with(tmp_path / "own", kind)
    document = json.loads((folder / "tokenizer.json").read_text())
    # Merges cut a prefix from their second half: one that is longer than it cannot be cut.
    document["model"]["continuing_subword_prefix"] = "a prefix that is long"
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(
        AdapterRefusedError, match="its tokenizer.json cannot be read: .*out of range"
    ):
        read_tokenizer(folder, None)
