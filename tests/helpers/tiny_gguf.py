"""A tiny Llama in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers import pre_tokenizers

_HIDDEN, _INNER, _HEADS = 32, 64, 4
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(
    path: Path,
    leave_out: str = "",
    tied: bool = True,
    types: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Write the file and return its tensors; ``types``: how some of them are quantized."""
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "12"]
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(_HIDDEN // _HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(_SPECIAL) + [1] * (len(tokens) - len(_SPECIAL)))
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    tensors = _tensors(len(tokens), tied)
    for name, values in tensors.items():
        if name != leave_out:
            kind = GGMLQuantizationType[(types or {}).get(name, "F32")]
            stored = values if kind is GGMLQuantizationType.F32 else quantize(values, kind)
            writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _tensors(vocabulary: int, tied: bool) -> dict[str, np.ndarray]:
    shapes = {
        "token_embd.weight": (vocabulary, _HIDDEN),
        "output_norm.weight": (_HIDDEN,),
        **{f"blk.0.attn_{part}.weight": (_HIDDEN, _HIDDEN) for part in "qkv"},
        "blk.0.attn_output.weight": (_HIDDEN, _HIDDEN),
        "blk.0.attn_norm.weight": (_HIDDEN,),
        "blk.0.ffn_norm.weight": (_HIDDEN,),
        "blk.0.ffn_gate.weight": (_INNER, _HIDDEN),
        "blk.0.ffn_up.weight": (_INNER, _HIDDEN),
        "blk.0.ffn_down.weight": (_HIDDEN, _INNER),
        **({} if tied else {"output.weight": (vocabulary, _HIDDEN)}),
    }
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
