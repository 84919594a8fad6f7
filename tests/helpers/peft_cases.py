"""What PEFT can express, as options of a LoraConfig for each tested family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.helpers.tiny_models import VOCAB_SIZE

GROWN = VOCAB_SIZE + 3


@dataclass(frozen=True)
class Names:
    """How a family names its modules."""

    queries: str
    outputs: str
    embedding: str
    layers: str
    more: tuple[str, ...]


LLAMA = Names("q_proj", "o_proj", "embed_tokens", "layers", ("v_proj", "down_proj", "up_proj"))
FAMILIES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "gemma2": LLAMA,
    "gpt2": Names("c_attn", "c_proj", "wte", "h", ("c_fc",)),
    "mixtral": Names("q_proj", "o_proj", "embed_tokens", "layers", ("k_proj", "v_proj")),
}
Make = Callable[[Names], dict[str, Any]]


def some(names: Names, **more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": [names.queries, names.outputs], **more}


# Options by the name of what they test; each is made for every family.
CASES: dict[str, Make] = {
    "list": lambda n: some(n, target_modules=[n.queries, *n.more], lora_dropout=0.5),
    "regex": lambda n: some(n, target_modules=rf".*\.{n.layers}\.1\..*({n.queries}|{n.outputs})"),
    "rslora": lambda n: some(n, use_rslora=True),
    "patterns": lambda n: some(
        n,
        rank_pattern={rf"1\.[a-z_]+\.{n.queries}": 7, n.outputs: 2},
        alpha_pattern={n.queries: 3, f"nothing.{n.outputs}": 90},
    ),
    "patterns and rslora": lambda n: some(
        n, use_rslora=True, rank_pattern={n.queries: 9}, alpha_pattern={f"^.*{n.outputs}": 1}
    ),
    "excluded names": lambda n: some(n, exclude_modules=[n.outputs]),
    "excluded by regex": lambda n: some(n, exclude_modules=rf".*\.0\..*{n.queries}"),
    "one layer": lambda n: some(n, layers_to_transform=1),
    "layers": lambda n: some(n, layers_to_transform=[0], layers_pattern=n.layers),
    "layers spare full names": lambda n: some(
        n, target_modules=[n.queries, "lm_head"], layers_to_transform=[0]
    ),
    "fan_in_fan_out": lambda n: some(n, fan_in_fan_out=True, use_dora=True),
    "bias of targets": lambda n: some(n, bias="lora_only"),
    "lora_bias": lambda n: some(
        n, target_modules=[n.queries, n.outputs, "lm_head"], lora_bias=True, use_rslora=True
    ),
    "lora_bias and bias of targets": lambda n: some(n, lora_bias=True, bias="lora_only"),
    "dora": lambda n: some(n, use_dora=True, target_modules=[n.queries, *n.more]),
    "dora and bias": lambda n: some(n, use_dora=True, bias="lora_only", use_rslora=True),
    "head": lambda n: some(n, target_modules=[n.queries, "lm_head"]),
    "embedding": lambda n: some(n, target_modules=[n.queries, n.embedding]),
    "dora on embedding and head": lambda n: some(
        n, target_modules=[n.embedding, "lm_head"], use_dora=True
    ),
    "saved head": lambda n: some(n, modules_to_save=["lm_head"]),
    "saved embedding": lambda n: some(n, modules_to_save=[n.embedding]),
    "saved linear": lambda n: some(n, target_modules=[n.queries], modules_to_save=[n.outputs]),
    "token rows": lambda n: some(n, trainable_token_indices=[40, 7]),
    "token rows of the head": lambda n: some(n, trainable_token_indices={"lm_head": [40, 7, 2]}),
    "token rows of both": lambda n: some(
        n, trainable_token_indices={n.embedding: [40, 3], "lm_head": [3, 7]}
    ),
    "parameters": lambda n: some(
        n, target_modules=[], target_parameters=[f"{n.queries}.weight", f"{n.outputs}.weight"]
    ),
    "parameters of embedding and head": lambda n: some(
        n, target_modules=[], target_parameters=[f"{n.embedding}.weight", "lm_head.weight"]
    ),
    "velora": lambda n: some(n, velora_config={"num_groups": 4}),
    "ensured tying": lambda n: some(
        n, target_modules=[n.queries, n.embedding], ensure_weight_tying=True
    ),
    "ensured tying of saved": lambda n: some(
        n, modules_to_save=[n.embedding], ensure_weight_tying=True
    ),
    **{
        f"init {init}": (lambda n, init=init: some(n, init_lora_weights=init))
        for init in (False, "gaussian", "eva", "orthogonal", "mica")
    },
}
# Those in which it matters that embedding and head are one.
TIED_CASES = [
    name for name in CASES if any(word in name for word in ("head", "embedding", "token", "tying"))
]
# What some families cannot express.
EXTRA: list[tuple[str, str, Make]] = [
    *(
        (family, "all-linear", lambda n: some(n, target_modules="all-linear"))
        for family in ("llama", "qwen2", "gemma2", "gpt2")
    ),
    ("qwen2", "all biases", lambda n: some(n, bias="all", target_modules=[n.queries])),
    ("llama", "all biases", lambda n: some(n, bias="all")),
    ("gpt2", "all biases", lambda n: some(n, bias="all", target_modules=[n.queries])),
    ("gpt2", "all biases and dora", lambda n: some(n, bias="all", use_dora=True)),
    ("gpt2", "saved norms", lambda n: some(n, modules_to_save=["ln_1", "ln_f"])),
    ("llama", "saved norms", lambda n: some(n, modules_to_save=["norm"])),
    ("gemma2", "saved norms", lambda n: some(n, modules_to_save=["input_layernorm"])),
]
GROWTH: dict[str, Make] = {
    "grown": some,
    "grown, token rows": lambda n: some(n, trainable_token_indices=[VOCAB_SIZE, VOCAB_SIZE + 1, 5]),
    "grown, embedding": lambda n: some(n, target_modules=[n.queries, n.embedding, "lm_head"]),
    "grown, lora_bias": lambda n: some(
        n,
        target_modules=[n.queries, "lm_head"],
        modules_to_save=[n.embedding],
        lora_bias=True,
    ),
    # No Conv1D beside them: PEFT would take its transposed weight for theirs, and refuse.
    "grown, parameters": lambda n: some(
        n,
        target_modules=[],
        target_parameters=[f"{n.embedding}.weight", "lm_head.weight"],
    ),
    "grown, saved": lambda n: some(n, modules_to_save=[n.embedding, "lm_head"]),
}
