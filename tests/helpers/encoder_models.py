"""Tiny random encoders of each served family, saved as folders like those on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.helpers.tiny_models import VOCAB_SIZE, make_tokenizer, widen

# How many tokens the longest text of each has.
LONGEST = 40
# What RoBERTa takes for padding, behind whose number its positions begin.
_PAD = 1

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": LONGEST,
    "pad_token_id": 0,
}
_FAIRSEQ = {"max_position_embeddings": LONGEST + _PAD + 1, "pad_token_id": _PAD}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Its layers are one and the same; the second group's are others.
    "albert": ("AlbertConfig", {"embedding_size": 24, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "bert": ("BertConfig", {}),
    "deberta": (
        "DebertaConfig",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2},
    ),
    # As v3, but for the positions that these add to tokens.
    "deberta-v2": (
        "DebertaV2Config",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
         "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 6, "sinusoidal_pos_embds": False},
    ),
    "electra": ("ElectraConfig", {"embedding_size": 24}),
    # A layer that sees all, then two that see four tokens to each side.
    "modernbert": (
        "ModernBertConfig",
        {"num_hidden_layers": 3, "local_attention": 8, "norm_bias": True, "cls_token_id": 0,
         "sep_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "mpnet": ("MPNetConfig", _FAIRSEQ),
    "roberta": ("RobertaConfig", {**_FAIRSEQ, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaConfig", {**_FAIRSEQ, "type_vocab_size": 1}),
}  # fmt: skip
# Each takes its sizes under names of its own.
_OWN_NAMES = {"distilbert": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}  # fmt: skip
# Those whose token types tell two texts apart.
TELLS_TEXTS_APART = frozenset({"albert", "bert", "deberta", "electra"})


def encoder_config(family: str, **overrides: Any) -> Any:
    """Return the transformers config of a tiny encoder."""
    import transformers

    config_class, extra = ENCODERS[family]
    shape = {
        name: value for name, value in _SHAPE.items() if name not in _OWN_NAMES.get(family, ())
    }
    return getattr(transformers, config_class)(**{**shape, **extra, **overrides})


def make_tiny_encoder(
    family: str, path: Path, *, seed: int = 0, around: str = "", **overrides: Any
) -> Path:
    """Save a tiny random encoder with its tokenizer to ``path``, which is returned.

    ``around``: as a part of a model for this, such as ``MaskedLM``, whose file it is.
    """
    import transformers

    path.mkdir(parents=True, exist_ok=True)
    make_tokenizer(path)
    config = encoder_config(family, **overrides)
    stock = getattr(transformers, f"AutoModelFor{around}" if around else "AutoModel")
    model = stock.from_config(config, dtype=torch.float32)
    widen(model, seed)
    model.save_pretrained(path, safe_serialization=True)
    return path


def load_encoder(path: Path) -> Any:
    """Return transformers' own encoder of a folder, with its plain attention."""
    import transformers

    model = transformers.AutoModel.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()
