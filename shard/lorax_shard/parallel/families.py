"""Plans for families that transformers has none for, or one that gathers without need.

In transformers' words: ``colwise``, ``rowwise``, ``packed_colwise`` (two stacked matrices, each
split), ``moe_tp_experts``; and two of ours: ``norm`` (a norm over all heads at once) and
``sinks`` (one number a head). Below the base model.
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

PLANS: dict[str, dict[str, str]] = {
    "glm4": {**_SEPARATE, **_STACKED_MLP},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_oss": {
        **_SEPARATE,
        "layers.*.self_attn": "sinks",
        "layers.*.mlp.experts": "moe_tp_experts",
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
}
