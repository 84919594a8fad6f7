"""Adapters of all kinds for the made-up base model, and changes of whole folders."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from tests.fuzz.targets.mutate import ODD, dumped
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
)
from tests.helpers.tiny_tokenizers import byte_level

from lorax_shard.adapter_files import (
    CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
)
from lorax_shard.peft.fields import BY_NAME

_PREFIX = "base_model.model."
_OUTPUT = QUERY.replace("q_proj", "o_proj")
_DTYPES = ("F16", "BF16", "F32", "F64", "I8", "I64", "U8", "BOOL", "F8_E4M3", "", None, 5, "f32")
Adapter = tuple[dict[str, Any], dict[str, torch.Tensor]]


def _with(options: dict[str, Any], **more: torch.Tensor) -> Adapter:
    return config(**options), tensors() | {f"{_PREFIX}{name}": each for name, each in more.items()}


VARIANTS: tuple[Callable[[], Adapter], ...] = (
    lambda: (config(), tensors()),
    lambda: (config(target_modules=[QUERY, _OUTPUT], use_rslora=True), tensors(QUERY, _OUTPUT)),
    lambda: _with({"use_dora": True}, **{f"{QUERY}.lora_magnitude_vector": torch.ones(WIDTH)}),
    lambda: _with({"bias": "lora_only"}, **{f"{QUERY}.base_layer.bias": torch.ones(WIDTH)}),
    lambda: _with({"modules_to_save": [NORM]}, **{f"{NORM}.weight": torch.ones(WIDTH), f"{NORM}.bias": torch.ones(WIDTH)}),
    lambda: _with({"modules_to_save": [HEAD]}, **{f"{HEAD}.weight": torch.ones(VOCABULARY, WIDTH)}),
    lambda: _with({"trainable_token_indices": [1, 4]},
                  **{f"{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(2, WIDTH)}),
    lambda: (config(target_modules=["embed_tokens"]), embedding_tensors()),
    lambda: (config(rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 7.5}), tensors(rank=3)),
    lambda: (config(target_modules=r".*\.0\..*q_proj"), tensors()),
    lambda: (config(lora_dropout=0.1, inference_mode=True, task_type="CAUSAL_LM", layers_to_transform=[0]), tensors()),
    lambda: (config(alora_invocation_tokens=[3, 4]), tensors()),
)  # fmt: skip


def _option(draw: random.Random, content: Any) -> Any:
    """An option that is known, with an odd value or one of another option's."""
    values = [*ODD, *content["config"].values(), RANK + 1, ["q_proj"], "all-linear", "(a+)+$", "lora_only",
              {"q_proj": 3}, {".*": 10**9}, [0, 1, -1], 10**9, -2, [2**70], {"": 1}, {"(": 1}]  # fmt: skip
    name = draw.choice(sorted(BY_NAME))
    return {**content, "config": {**content["config"], name: copy.deepcopy(draw.choice(values))}}


def _entry(draw: random.Random, content: Any) -> Any:
    """A tensor of another type, shape or place."""
    header = copy.deepcopy(content["header"])
    names = [name for name in header if isinstance(header[name], dict)]
    if not names:
        return content
    entry = header[draw.choice(names)]
    span, shape = _listed(entry, "data_offsets"), _listed(entry, "shape")
    match draw.randrange(6):
        case 0:
            entry["dtype"] = draw.choice(_DTYPES)
        case 1:
            entry["shape"] = draw.choice([shape[::-1], [*shape, 1], [1, *shape], shape[:1], [], [0], [2**31, 2**31], [-1, -2],
                                          [True], [1.0], [2**62], [math.prod(shape)]])  # fmt: skip
        case 2:
            entry["data_offsets"] = draw.choice(
                [span[::-1], [0, 0], [0], [0, 2**62], [-4, 4], [0, 1 << 70], ["0", "4"], [0.0, 4.0]]
            )
        case 3:
            entry[draw.choice(["dtype", "shape", "extra"])] = draw.choice(ODD)
        case 4:
            header[draw.choice(names) + draw.choice([".weight", "\n", ".default"])] = entry
        case 5:
            header["__metadata__"] = draw.choice(ODD)
    return {**content, "header": header}


def _listed(entry: dict[str, Any], name: str) -> list[int]:
    """Return the numbers of a list; others may have changed them already."""
    found = entry.get(name)
    return [each for each in found if type(each) is int] if isinstance(found, list) else []


def _tensor_name(draw: random.Random, content: Any) -> Any:
    """A tensor by another name."""
    header = dict(content["header"])
    if not header:
        return content
    name = draw.choice(sorted(header))
    others = [*make_base().modules, "x", "", "a" * 600, "\x00", "é", "lora_A", "..", "model"]
    parts = ["lora_A.weight", "lora_B.weight", "weight", "bias", "lora_magnitude_vector", "base_layer.weight", "lora_embedding_A",
             "lora_B.bias", "token_adapter.trainable_tokens_delta", "original_module.weight", "lora_A.x.weight"]  # fmt: skip
    header[
        f"{draw.choice([_PREFIX, _PREFIX, '', 'base_model.'])}{draw.choice(others)}.{draw.choice(parts)}"
    ] = header.pop(name)
    return {**content, "header": header}


def _numbers(draw: random.Random, content: Any) -> Any:
    """Weights that are NaN, infinite or anything."""
    data = bytearray(content["data"])
    if data:
        piece = draw.choice(
            [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", draw.randbytes(4), b"\xff" * 4]
        )
        start = 4 * draw.randrange(max(1, len(data) // 4))
        data[start : start + 4] = piece
    return {**content, "data": bytes(data)}


def _more_data(draw: random.Random, content: Any) -> Any:
    """More bytes than are announced, or fewer."""
    data = content["data"]
    return {
        **content,
        "data": draw.choice([data + b"x" * 8, data[:-4], b"", data * 2, data + b"\0" * (2 << 20)]),
    }


def _extra_file(draw: random.Random, content: Any) -> Any:
    """A file beside the others: of a tokenizer, a template, or none that anybody knows."""
    name = draw.choice([TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
                        "special_tokens_map.json", "added_tokens.json", "README.md", "modeling.py", "adapter_model.bin", "entry.json",
                        "adapters.safetensors", "tokenizer.model"])  # fmt: skip
    raw = [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"model": {"vocab": {"a": 1e999}}}', b'{"model": {"vocab": []}}',
           byte_level().to_str().encode(), dumped(draw.choice(ODD)), b"{{ messages }}", b'{"eos_token": "<|end|>"}',
           json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": draw.choice([2**31, -1, 2**70])}, "merges": []}}).encode(),
           b"version https://git-lfs.github.com/spec/v1\noid"]  # fmt: skip
    return {**content, "others": {**content["others"], name: draw.choice(raw)}}


def _odd_file(draw: random.Random, content: Any) -> Any:
    """A link, a pipe or a folder in a file's place."""
    name = draw.choice([CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, "chat_template.jinja"])
    kind = draw.choice(
        ["link outside", "link nowhere", "link to itself", "folder", "pipe", "empty"]
    )
    return {**content, "odd": {**content["odd"], name: kind}}


def _mlx(draw: random.Random, content: Any) -> Any:
    """A configuration as mlx-lm writes it, with the same weights."""
    parameters = {
        "rank": RANK,
        "scale": draw.choice([2.0, *ODD]),
        "dropout": 0.0,
        "keys": draw.choice([["attn.q_proj"], *ODD]),
    }
    document = {"fine_tune_type": draw.choice(["lora", "dora", "full", 5]), "num_layers": draw.choice([1, 2, -1, *ODD]),
                "lora_parameters": parameters, "model": "toy"}  # fmt: skip
    return {**content, "config": document}


def _mlx_names(draw: random.Random, content: Any) -> Any:
    """Tensors by the names that mlx-lm gives them."""
    header = {
        name.removeprefix(_PREFIX)
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): entry
        for name, entry in content["header"].items()
    }
    return {**_mlx(draw, content), "header": header}


MUTATORS = {
    each.__name__.removeprefix("_"): each
    for each in (
        _option,
        _entry,
        _tensor_name,
        _numbers,
        _more_data,
        _extra_file,
        _odd_file,
        _mlx,
        _mlx_names,
    )
}
