"""Plans for families that transformers has none for, or one that gathers without need.

In transformers' words: ``colwise``, ``rowwise``, ``packed_colwise`` (two stacked matrices, each
split), ``moe_tp_experts``; and five of ours: ``norm`` (a norm over all heads at once), ``sinks``
(one number a head), ``heads_table`` (an embedding with one number a head), ``heads_colwise`` and
``heads_rowwise`` (outputs and inputs are heads, of queries and keys alike, once or stacked). Below the
base model; the first name that fits counts.
"""

from __future__ import annotations

_SEPARATE = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_STACKED_MLP = {
    "layers.*.mlp.gate_up_proj": "packed_colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
_GPT2 = {
    "h.*.attn.c_attn": "colwise",
    "h.*.attn.c_proj": "rowwise",
    "h.*.mlp.c_fc": "colwise",
    "h.*.mlp.c_proj": "rowwise",
}

_BERT = {
    "encoder.layer.*.attention.self.query": "heads_colwise",
    "encoder.layer.*.attention.self.key": "heads_colwise",
    "encoder.layer.*.attention.self.value": "heads_colwise",
    "encoder.layer.*.attention.output.dense": "heads_rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}

PLANS: dict[str, dict[str, str]] = {
    "albert": {
        "encoder.albert_layer_groups.*.attention.query": "heads_colwise",
        "encoder.albert_layer_groups.*.attention.key": "heads_colwise",
        "encoder.albert_layer_groups.*.attention.value": "heads_colwise",
        "encoder.albert_layer_groups.*.attention.dense": "heads_rowwise",
        "encoder.albert_layer_groups.*.ffn": "colwise",
        "encoder.albert_layer_groups.*.ffn_output": "rowwise",
    },
    "bert": _BERT,
    "deberta-v2": {
        "encoder.layer.*.attention.self.*_proj": "heads_colwise",
        "encoder.layer.*.attention.output.dense": "heads_rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
    },
    "distilbert": {
        "transformer.layer.*.attention.q_lin": "heads_colwise",
        "transformer.layer.*.attention.k_lin": "heads_colwise",
        "transformer.layer.*.attention.v_lin": "heads_colwise",
        "transformer.layer.*.attention.out_lin": "heads_rowwise",
        "transformer.layer.*.ffn.lin1": "colwise",
        "transformer.layer.*.ffn.lin2": "rowwise",
    },
    "electra": _BERT,
    "glm4": {**_SEPARATE, **_STACKED_MLP},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_oss": {
        **_SEPARATE,
        "layers.*.self_attn": "sinks",
        "layers.*.mlp.experts": "moe_tp_experts",
    },
    "modernbert": {
        "layers.*.attn.Wqkv": "heads_colwise",
        "layers.*.attn.Wo": "heads_rowwise",
        "layers.*.mlp.Wi": "packed_colwise",
        "layers.*.mlp.Wo": "rowwise",
    },
    "mpnet": {
        "encoder.relative_attention_bias": "heads_table",
        "encoder.layer.*.attention.attn.q": "heads_colwise",
        "encoder.layer.*.attention.attn.k": "heads_colwise",
        "encoder.layer.*.attention.attn.v": "heads_colwise",
        "encoder.layer.*.attention.attn.o": "heads_rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
    },
    "olmo2": {
        **_SEPARATE,
        "layers.*.self_attn.q_norm": "norm",
        "layers.*.self_attn.k_norm": "norm",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    },
    "opt": {
        "decoder.layers.*.self_attn.q_proj": "colwise",
        "decoder.layers.*.self_attn.k_proj": "colwise",
        "decoder.layers.*.self_attn.v_proj": "colwise",
        "decoder.layers.*.self_attn.out_proj": "rowwise",
        "decoder.layers.*.fc1": "colwise",
        "decoder.layers.*.fc2": "rowwise",
    },
    "phi3": {
        "layers.*.self_attn.qkv_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        **_STACKED_MLP,
    },
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}
