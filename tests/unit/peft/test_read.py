"""What is refused when a folder is read, and in which words; the oracle tests what is not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers.small_adapters import (
    EMBEDDING,
    HEAD,
    NORM,
    QUERY,
    RANK,
    VOCABULARY,
    WIDTH,
    config,
    embedding_tensors,
    make_base,
    tensors,
    write,
)

from lorax_shard.lora.delta import HostAdapter
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import CONFIG_FILE, WEIGHTS_FILE, AdapterLimits
from lorax_shard.peft.read import examine, is_finite, read_adapter

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]


def read(folder: Path, **base: Any) -> HostAdapter:
    return read_adapter(folder, make_base(**base), AdapterLimits())


def refusal(folder: Path, **base: Any) -> str:
    with pytest.raises(AdapterRefusedError) as caught:
        read(folder, **base)
    return caught.value.public


def test_a_plain_adapter_is_read(tmp_path: Path) -> None:
    adapter = read(write(tmp_path))
    assert list(adapter.modules) == [QUERY]
    delta = adapter.modules[QUERY]
    assert (delta.rank, delta.scaling, adapter.vocab_size) == (RANK, 2.0, 0)
    assert delta.a is not None
    assert torch.equal(delta.a, tensors()[f"{PREFIX}{QUERY}.lora_A.weight"])
    assert len(adapter.digest) == 64


def test_names_of_older_releases_are_read(tmp_path: Path) -> None:
    values = {key.replace(".weight", ".default.weight"): each for key, each in tensors().items()}
    values[f"{PREFIX}{QUERY}.lora_magnitude_vector.default"] = torch.ones(WIDTH)
    old = read(write(tmp_path / "old", config(use_dora=True), values))
    values = tensors() | {f"{PREFIX}{QUERY}.lora_magnitude_vector": torch.ones(WIDTH)}
    new = read(write(tmp_path / "new", config(use_dora=True), values))
    assert old.digest == new.digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_place_hides_what_is_not_finite(value: float, dtype: torch.dtype) -> None:
    whole = torch.randn(7, 37).to(dtype)
    assert is_finite(whole)
    assert is_finite(whole[:0])
    for place in range(whole.numel()):
        assert not is_finite(spoilt(place, value)(whole))


def with_(key: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda values: {**values, f"{PREFIX}{key}": value}


def without(key: str) -> Callable[[Tensors], Tensors]:
    return lambda values: {name: each for name, each in values.items() if key not in name}


def changed(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    return lambda values: {
        name: change(each) if key in name else each for name, each in values.items()
    }


def spoilt(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without("lora_B"), f"weights are missing that adapter_config.json asks for: {QUERY} (b)"),
        (
            with_(f"{QUERY}.lora_magnitude_vector", torch.ones(WIDTH)),
            f"does not ask for: {PREFIX}{QUERY}.lora_magnitude_vector",
        ),
        (
            with_("model.layers.1.attn.o_proj.lora_A.weight", torch.ones(RANK, WIDTH)),
            "does not ask for: base_model.model.model.layers.1.attn.o_proj.lora_A.weight",
        ),
        (with_(f"{QUERY}.weight", torch.ones(WIDTH, WIDTH)), f"does not ask for: {PREFIX}{QUERY}"),
        (with_(f"{NORM}.weight", torch.ones(WIDTH)), f"does not ask for: {PREFIX}{NORM}.weight"),
        (
            with_("model.layers.0.mlp.w1.lora_A.weight", torch.ones(RANK, WIDTH)),
            "it has weights for model.layers.0.mlp.w1; the adapter was made for another base model",
        ),
        (
            with_(f"{QUERY}.lora_strange", torch.ones(3)),
            f"names this server does not know: {PREFIX}{QUERY}.lora_strange",
        ),
        (
            with_(f"{QUERY}.lora_B.bias", torch.ones(WIDTH)),
            f"does not ask for: {PREFIX}{QUERY}.lora_B.bias",
        ),
        (
            with_(f"{QUERY}.lora_A.default.weight", torch.ones(RANK, WIDTH)),
            "is there twice, under another name",
        ),
        (
            changed("lora_A", lambda each: each[:1].clone()),
            f"has the rank 1; adapter_config.json says 2 for {QUERY}",
        ),
        (
            changed("lora_A", lambda each: torch.ones(RANK, WIDTH + 2)),
            "has the shape [2, 8], where [2, 6] fits; the adapter was made for another base model",
        ),
        (changed("lora_B", lambda each: each.reshape(-1)), "has the shape [12], where [6, 2] fits"),
        (
            changed("lora_A", spoilt(3, float("nan"))),
            f"weights are NaN or infinite in {PREFIX}{QUERY}.lora_A.weight",
        ),
        (changed("lora_B", spoilt(0, float("-inf"))), "weights are NaN or infinite"),
        (changed("lora_A", lambda each: each.double()), "has the type 'F64'; adapters are read in"),
        (changed("lora_A", lambda each: each.long()), "has the type 'I64'"),
        (
            lambda values: {key.removeprefix(PREFIX): each for key, each in values.items()},
            "none of its 2 tensors has a name that PEFT gives: those begin with base_model.model.",
        ),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[Tensors], Tensors], text: str, tmp_path: Path
) -> None:
    write(tmp_path, values=change(tensors()))
    assert text in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", [f"language_model.{QUERY}", QUERY.removeprefix("model."), f"base.{QUERY}"]
)
def test_names_with_another_beginning_are_told_beside_the_expected_one(
    name: str, tmp_path: Path
) -> None:
    values = {key.replace(QUERY, name): each for key, each in tensors().items()}
    text = refusal(write(tmp_path, config(target_modules=["q_proj"]), values))
    assert text.startswith(
        "none of the 1 modules that it has weights for has a name of this model: "
        f"it says {name} where {QUERY} is expected; the adapter was made for another base model"
    )


@pytest.mark.parametrize(
    "name", [CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json", "chat_template.jinja"]
)
def test_pointers_of_git_lfs_are_known_for_what_they_are(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 134235048\n"
    )
    assert refusal(tmp_path).startswith(f"{name} is a Git LFS pointer, which stands for the file")
    assert "git lfs pull" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("trained_on", "served", "told"),
    [
        ("org/Llama-3.2-1B", "other/llama-3.2-1b", False),
        ("org/Llama-3.2-1B", "/models/Llama-3.2-1B/", False),
        ("/cache/models--org--Llama-3.2-1B/snapshots/0123abc", "org/Llama-3.2-1B@main", False),
        ("org/Llama-3.2-1B", "/models/Llama-3.2-1B.Q4_1.gguf", False),
        ("org/Llama-3.2-1B", "org/Llama-3.2-1B-Instruct", True),
        ("org/Llama-3.2-1B-4bit", "org/Llama-3.2-1B", True),
        ("", "org/Llama-3.2-1B", False),
        ("org/Llama-3.2-1B", "", False),
        (None, "org/Llama-3.2-1B", False),
    ],
)
def test_another_base_models_name_is_a_warning(
    trained_on: str | None, served: str, told: bool, tmp_path: Path
) -> None:
    write(tmp_path, config(base_model_name_or_path=trained_on))
    warnings = examine(tmp_path, make_base(), AdapterLimits(), model_id=served).warnings
    expected = f"it was made for the base model {trained_on}, and this server has {served}"
    assert warnings == ((expected,) if told else ())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_dora": True}, f"asks for: {QUERY} (magnitude)"),
        ({"lora_bias": True}, f"asks for: {QUERY} (b_bias)"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias and use_dora exclude each other"),
        (
            {"lora_bias": True, "target_modules": ["embed_tokens"]},
            f"lora_bias reaches {EMBEDDING}, an Embedding; PEFT has it on linears only",
        ),
        ({"bias": "lora_only"}, f"asks for: {QUERY} (base_bias)"),
        ({"bias": "all"}, "asks for: model.layers.0.attn.q_proj (base_bias)"),
        ({"modules_to_save": [HEAD]}, f"asks for: {HEAD} (weight)"),
        ({"trainable_token_indices": [1]}, f"asks for: {EMBEDDING} (token_rows)"),
        ({"rank_pattern": {"q_proj": 600}}, f"{QUERY} has the rank 600; the limit is 512"),
        (
            {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
            "made for a LlamaForCausalLM; this server's base model is a ToyForCausalLM",
        ),
    ],
)
def test_options_that_the_weights_do_not_bear_out(
    options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    assert text in refusal(write(tmp_path, config(**options)))


def test_trained_biases_of_norms_are_read_and_of_other_modules_refused(tmp_path: Path) -> None:
    values = tensors() | {
        f"{PREFIX}{QUERY}.base_layer.bias": torch.ones(WIDTH),
        f"{PREFIX}model.layers.1.attn.q_proj.bias": torch.ones(WIDTH),
        f"{PREFIX}{NORM}.bias": torch.ones(WIDTH),
    }
    norm = read(write(tmp_path, config(bias="all"), values)).modules[NORM]
    assert norm.bias is not None
    assert norm.weight is None
    values[f"{PREFIX}model.bias"] = torch.ones(WIDTH)
    text = refusal(write(tmp_path, config(bias="all"), values))
    assert text.startswith("it brings a bias for model, a ToyModel; only biases of linears and")


def test_names_in_texts_are_printable(tmp_path: Path) -> None:
    key = f"{PREFIX}\n\x1b[2J{'x' * 400}.lora_A.weight"
    text = refusal(write(tmp_path, values=tensors() | {key: torch.ones(1)}))
    assert text.isprintable()
    assert len(text) < 500
    mapping = {"base_model_class": "Mine\nForCausalLM"}
    assert refusal(write(tmp_path, config(auto_mapping=mapping))).isprintable()


def test_token_rows_of_a_head_with_a_bias_are_refused(tmp_path: Path) -> None:
    rows = {f"{PREFIX}{HEAD}.token_adapter.trainable_tokens_delta": torch.ones(1, WIDTH)}
    write(tmp_path, config(trainable_token_indices={HEAD: [2]}), tensors() | rows)
    assert HEAD in read(tmp_path).modules
    assert refusal(tmp_path, head_bias=True).startswith(
        "trainable_token_indices reaches lm_head, a Linear with a bias; only embeddings and heads"
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        # The head's rows for the new tokens are missing.
        (
            {f"{EMBEDDING}.weight": torch.ones(VOCABULARY + 2, WIDTH)},
            "it adds 2 tokens, and the weights of lm_head for them are not in it",
        ),
        (
            {f"{EMBEDDING}.weight": torch.ones(VOCABULARY - 2, WIDTH)},
            "its vocabulary has 18 tokens where the base has 20",
        ),
        (
            {
                f"{EMBEDDING}.weight": torch.ones(VOCABULARY + 2, WIDTH),
                f"{HEAD}.weight": torch.ones(VOCABULARY + 3, WIDTH),
            },
            "its vocabulary has 22 and 23 tokens where the base has 20",
        ),
    ],
)
def test_vocabularies_that_are_not_complete(values: Tensors, text: str, tmp_path: Path) -> None:
    values = tensors() | {f"{PREFIX}{key}": each for key, each in values.items()}
    assert text in refusal(write(tmp_path, values=values))


def test_a_head_with_a_bias_needs_it_for_added_tokens(tmp_path: Path) -> None:
    names = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
    values = tensors() | {f"{PREFIX}{name}": torch.ones(VOCABULARY + 2, WIDTH) for name in names}
    assert read(write(tmp_path, values=values)).vocab_size == 22
    assert "the weights of lm_head for them are not in it" in refusal(tmp_path, head_bias=True)
    values[f"{PREFIX}{HEAD}.bias"] = torch.ones(VOCABULARY + 2)
    adapter = read(write(tmp_path, values=values), head_bias=True)
    assert adapter.modules[HEAD].bias is not None


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    rows = {f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(1, WIDTH)}
    write(tmp_path, config(trainable_token_indices=[VOCABULARY]), tensors() | rows)
    assert refusal(tmp_path) == (f"trainable_token_indices names token 20; {EMBEDDING} has 20 rows")


def test_tied_modules_share_a_replaced_weight(tmp_path: Path) -> None:
    options = config(target_modules=["embed_tokens"])
    weight = torch.randn(VOCABULARY, WIDTH)
    values = embedding_tensors() | {f"{PREFIX}{EMBEDDING}.base_layer.weight": weight}
    write(tmp_path, options, values)
    assert list(read(tmp_path).modules) == [EMBEDDING]
    tied = read(tmp_path, tied=True).modules
    assert tied[HEAD].weight is tied[EMBEDDING].weight
    assert tied[HEAD].a is None


@pytest.mark.parametrize("what", ["weight", "low rank", "rows"])
def test_tied_modules_with_different_tensors_are_refused(what: str, tmp_path: Path) -> None:
    values = embedding_tensors()
    options: dict[str, Any] = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    a, b = (f"{PREFIX}{EMBEDDING}.lora_embedding_{letter}" for letter in "AB")
    values[f"{PREFIX}{HEAD}.lora_A.weight"] = values[b].T.contiguous()
    values[f"{PREFIX}{HEAD}.lora_B.weight"] = values[a].T.contiguous()
    if what == "weight":
        for name in (EMBEDDING, HEAD):
            values[f"{PREFIX}{name}.base_layer.weight"] = torch.randn(VOCABULARY, WIDTH)
    elif what == "low rank":
        values[f"{PREFIX}{HEAD}.lora_A.weight"] += 1
    else:
        options = {"trainable_token_indices": [4]}
        values = tensors()
        for name in (EMBEDDING, HEAD):
            key = f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"
            values[key] = torch.randn(1, WIDTH)
    text = refusal(write(tmp_path, config(**options), values), tied=True)
    assert text.startswith(f"{EMBEDDING}, {HEAD} share their weights in the base model")


def test_values_beyond_the_models_type_are_refused(tmp_path: Path) -> None:
    values = tensors() | {f"{PREFIX}{QUERY}.base_layer.bias": torch.full((WIDTH,), 1e6)}
    write(tmp_path, config(bias="lora_only"), values)
    assert read(tmp_path).modules[QUERY].bias is not None
    base = dataclasses.replace(make_base(), dtype="float16")
    with pytest.raises(AdapterRefusedError, match="too large for the type .*float16"):
        read_adapter(tmp_path, base, AdapterLimits())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 41}}}')
    return write(folder)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_whole(
    whole: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Any change of any file gives a refusal, or an adapter whose tensors are finite and fit."""
    names = (CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json")
    contents = {name: bytearray((whole / name).read_bytes()) for name in names}
    damaged = contents[data.draw(st.sampled_from(names))]
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["replace", "cut", "insert"]))
        if kind == "cut":
            del damaged[position : position + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            damaged[position:position] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            damaged[position] = data.draw(st.integers(0, 255))
        if not damaged:
            break
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    try:
        adapter = examine(tmp_path, make_base(), AdapterLimits()).adapter
    except AdapterRefusedError:
        return
    for name, delta in adapter.modules.items():
        assert delta.a is not None
        assert delta.b is not None
        info = make_base().modules[name]
        assert (delta.b @ delta.a).shape == (info.out_features, info.in_features)
        assert torch.isfinite(delta.a).all()
        assert torch.isfinite(delta.b).all()


def test_a_refusal_is_the_callers_fault(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefusedError) as caught:
        read(write(tmp_path, json.loads('{"peft_type": "IA3"}')))
    assert caught.value.kind.http_status == 422
