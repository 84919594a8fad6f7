"""The normal form on disk, the digest, and the types that adapters are held in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.small_adapters import QUERY, config, make_base, tensors, write
from tests.helpers.tiny_models import make_tokenizer

from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.context import make_context
from lorax_shard.peft.digest import FORMAT, TENSOR_PARTS, content_digest, digest_adapter
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits, TextFiles
from lorax_shard.peft.normal import cast, read_normal, write_normal
from lorax_shard.peft.read import read_adapter
from lorax_shard.peft.verify import verify


def full_adapter() -> HostAdapter:
    """Return an adapter with every part, two of which modules share."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = draw(20, 6)
    modules = {
        "head": ModuleDelta(weight=weight, bias=draw(20)),
        "tokens": ModuleDelta(
            a=draw(2, 20).bfloat16(), b=draw(6, 2).half(), scaling=1 / 3, weight=weight,
            magnitude=draw(6), token_ids=torch.tensor([4, 19]), token_rows=draw(2, 6),
        ),
    }  # fmt: skip
    adapter = HostAdapter(
        digest="", modules=modules, vocab_size=20, traits=frozenset({"rslora"}),
        invocation_ids=(3, 9),
    )  # fmt: skip
    return digest_adapter(adapter)


def same(left: HostAdapter, right: HostAdapter) -> bool:
    facts = [
        (each.digest, each.vocab_size, each.traits, each.invocation_ids, each.head_facts)
        for each in (left, right)
    ]
    if facts[0] != facts[1]:
        return False
    if list(left.modules) != list(right.modules):
        return False
    for name, one in left.modules.items():
        other = right.modules[name]
        for part in TENSOR_PARTS:
            a, b = getattr(one, part), getattr(other, part)
            if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
                return False
        if one.scaling != other.scaling:
            return False
    return True


def test_the_normal_form_keeps_everything(tmp_path: Path) -> None:
    adapter = full_adapter()
    write_normal(adapter, tmp_path)
    again = read_normal(tmp_path)
    assert same(again, adapter)
    # Stored once, and one object again.
    assert again.modules["head"].weight is again.modules["tokens"].weight
    assert len(load_file(tmp_path / "adapter.safetensors")) == 6


def test_labels_are_kept_and_are_part_of_the_digest(tmp_path: Path) -> None:
    plain = dataclasses.replace(full_adapter(), head="sequence")
    facts = HeadFacts(pooling=Pooling.FIRST, labels=("bad", "good"), scores=ScoreKind.ANY_OF)
    others = (
        facts,
        dataclasses.replace(facts, labels=("good", "bad")),
        dataclasses.replace(facts, scores=ScoreKind.ONE_OF),
    )
    named = [digest_adapter(dataclasses.replace(plain, head_facts=each)) for each in others]
    assert len({each.digest for each in (digest_adapter(plain), *named)}) == 4
    write_normal(named[0], tmp_path)
    assert same(read_normal(tmp_path), named[0])


def test_types_are_those_that_peft_holds() -> None:
    adapter = cast(full_adapter(), dtype=torch.bfloat16)
    head, tokens = adapter.modules["head"], adapter.modules["tokens"]
    for part in ("a", "b", "magnitude"):
        assert getattr(tokens, part).dtype is torch.float32
    for tensor in (head.weight, head.bias, tokens.token_rows):
        assert tensor is not None
        assert tensor.dtype is torch.bfloat16
    assert tokens.token_ids is not None
    assert tokens.token_ids.dtype is torch.int64
    assert head.weight is tokens.weight
    narrow = cast(adapter, dtype=torch.bfloat16, low_rank_dtype=torch.float16)
    assert narrow.modules["tokens"].a is not None
    assert narrow.modules["tokens"].a.dtype is torch.float16


def test_tensors_of_the_right_type_are_not_copied() -> None:
    adapter = full_adapter()
    again = cast(adapter, dtype=torch.float32)
    assert again.modules["head"].weight is adapter.modules["head"].weight


def digest(folder: Path, options: dict[str, Any], values: dict[str, Any] | None = None) -> str:
    write(folder, options, values)
    return read_adapter(folder, make_base(), AdapterLimits()).digest


@pytest.mark.parametrize(
    "options",
    [
        {"base_model_name_or_path": "/home/somebody/model", "revision": "main"},
        {"lora_dropout": 0.3, "inference_mode": True, "peft_version": "0.10.0"},
        {"init_lora_weights": "gaussian", "task_type": "CAUSAL_LM"},
        {"target_modules": r".*\.0\..*q_proj"},
        {"r": 9, "rank_pattern": {"q_proj": 2}},
        {"lora_alpha": 4.0},
    ],
)
def test_adapters_that_compute_the_same_have_one_digest(
    options: dict[str, Any], tmp_path: Path
) -> None:
    assert digest(tmp_path / "a", config()) == digest(tmp_path / "b", config(**options))


def test_whatever_changes_the_output_changes_the_digest(tmp_path: Path) -> None:
    values = tensors()
    swapped = dict(zip(values, reversed(values.values()), strict=True))
    swapped = {key: each.T.contiguous() for key, each in swapped.items()}
    name = QUERY.replace("0", "1")
    found = [
        digest(tmp_path / "plain", config()),
        digest(tmp_path / "alpha", config(lora_alpha=5)),
        digest(tmp_path / "module", config(target_modules=[name]), tensors(name)),
        digest(tmp_path / "values", config(), {key: each + 1e-7 for key, each in values.items()}),
        digest(tmp_path / "swapped", config(), swapped),
        digest(tmp_path / "invoked", config(alora_invocation_tokens=[3])),
        digest(tmp_path / "invoked by others", config(alora_invocation_tokens=[3, 3])),
        digest(tmp_path / "type", config(), {key: each.half() for key, each in values.items()}),
    ]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/chat_template.jinja").write_text("{{ messages }}")
    found.append(digest(tmp_path / "text", config()))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "what", ["document", "tensors", "value", "part", "missing", "format", "shape", "ids", "scaling"]
)
def test_a_damaged_normal_form_is_refused(what: str, tmp_path: Path) -> None:
    write_normal(full_adapter(), tmp_path)
    document, file = tmp_path / "adapter.json", tmp_path / "adapter.safetensors"
    text, content = document.read_text(), bytearray(file.read_bytes())
    changes = {
        "document": text[:-3],
        "part": text.replace('"magnitude":', '"magnitudes":'),
        "format": text.replace(f'"format": {FORMAT}', '"format": 1'),
        "shape": json.dumps([text]),
        "ids": text.replace("[4, 19]", "[5, 19]"),
        "scaling": text.replace("0.33", "0.34"),
    }
    content[-1] ^= 1
    if what == "tensors":
        file.write_bytes(content[:-8])
    elif what == "value":
        file.write_bytes(content)
    elif what == "missing":
        file.unlink()
    else:
        assert changes[what] != text
        document.write_text(changes[what])
    with pytest.raises(AdapterRefusedError, match=r"adapter is damaged|format of another release"):
        read_normal(tmp_path)


def verified(folder: Path) -> Path:
    """Return the normal form of an adapter, made in its folder."""
    target = folder / "normal"
    target.mkdir()
    verify(folder, target, make_context(make_base(), AdapterLimits()))
    return target


def test_tensors_that_nothing_changed_stay_where_they_are(tmp_path: Path) -> None:
    normal = verified(write(tmp_path))
    assert [path.name for path in normal.iterdir()] == ["adapter.json"]
    assert same(read_normal(normal), read_adapter(tmp_path, make_base(), AdapterLimits()))
    # In memory of its own: another file there changes nothing that was read.
    adapter = read_normal(normal)
    delta = adapter.modules[QUERY]
    assert delta.a is not None
    before = delta.a.clone()
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(delta.a, before)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "chat_template.jinja"])
def test_files_that_changed_since_they_were_verified_are_found_out(
    name: str, tmp_path: Path
) -> None:
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    normal = verified(tmp_path)
    read_normal(normal)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterRefusedError, match="not what was verified"):
        read_normal(normal)


def test_what_was_verified_is_read_without_its_options(tmp_path: Path) -> None:
    """Patterns are the adapter's: once they were applied, nobody applies them again."""
    write(tmp_path, config(target_modules=r".*\.0\..*q_proj"))
    normal = verified(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert list(read_normal(normal).modules) == [QUERY]


def test_verification_tells_facts_that_json_has(tmp_path: Path) -> None:
    write(tmp_path / "adapter")
    folder, target = tmp_path / "adapter", tmp_path / "target"
    target.mkdir()
    tokenizer = make_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    context = make_context(make_base(), AdapterLimits())
    facts = verify(folder, target, json.loads(json.dumps(context)))
    assert json.loads(json.dumps(facts)) == facts
    assert facts.pop("derived") == facts.pop("content_digest")
    assert facts == {
        "nbytes": 96, "device_bytes": 96, "num_modules": 1, "max_rank": 2, "vocab_size": 0,
        "num_tokens": tokenizer.get_vocab_size(), "has_chat_template": False,
        "text_files": ["tokenizer.json"], "traits": [], "invocation_ids": [],
        "head": None, "warnings": [],
        "is_bases_tokenizer": False,
    }  # fmt: skip
    with pytest.raises(AdapterRefusedError, match="the limit is 1"):
        verify(folder, target, make_context(make_base(), AdapterLimits(max_rank=1)))


@pytest.mark.parametrize(("keeps_stored", "dora", "expected"), [
    (False, False, 96), (True, False, 48), (True, True, 24 + 48 + 24),
])  # fmt: skip
def test_what_it_takes_is_counted_in_the_types_that_it_keeps(
    keeps_stored: bool, dora: bool, expected: int, tmp_path: Path
) -> None:
    values = {name: each.bfloat16() for name, each in tensors().items()}
    if dora:
        values[f"base_model.model.{QUERY}.lora_magnitude_vector"] = torch.ones(6).bfloat16()
    write(tmp_path / "adapter", config(use_dora=dora), values)
    (tmp_path / "target").mkdir()
    base = dataclasses.replace(make_base(), keeps_stored=keeps_stored)
    facts = verify(tmp_path / "adapter", tmp_path / "target", make_context(base, AdapterLimits()))
    assert facts["device_bytes"] == expected


def test_a_release_with_another_form_does_not_find_this_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both lie beside the adapter's files, each by its digest."""
    adapter, text = full_adapter(), TextFiles()
    before = content_digest(adapter, text)
    monkeypatch.setattr("lorax_shard.peft.digest.FORMAT", FORMAT - 1)
    assert content_digest(adapter, text) != before


def test_a_digest_does_not_depend_on_the_order_of_modules() -> None:
    adapter = full_adapter()
    turned = dict(reversed(adapter.modules.items()))
    assert digest_adapter(dataclasses.replace(adapter, modules=turned)).digest == adapter.digest
