"""What a survey of a model asks of attention backends."""

import pytest
import torch
import transformers
from tests.helpers.tiny_models import tiny_config

from lorax_shard.attention.backend import AttentionLayer
from lorax_shard.attention.kv_cache import KVShape
from lorax_shard.model import attention_hook
from lorax_shard.model.probe import survey_attention

ASKED = {
    "gemma2": [
        AttentionLayer(6, KVShape(2, 16, 16), 32, window=7, softcap=4.0),
        AttentionLayer(6, KVShape(2, 16, 16), 32, softcap=4.0),
    ],
    "gpt2": [AttentionLayer(6, KVShape(6, 8, 8), 32)] * 2,
}


@pytest.mark.parametrize("family", ASKED)
def test_layers_ask_for_their_shapes_and_rules(family: str) -> None:
    attention_hook.register()
    model = transformers.AutoModelForCausalLM.from_config(
        tiny_config(family), attn_implementation=attention_hook.ATTENTION_NAME
    )
    assert survey_attention(model).layers(32) == ASKED[family]


def test_sinks_and_chunks_are_among_them() -> None:
    attention_hook.register()
    asked: dict[str, list[AttentionLayer]] = {}
    for family in ("gpt_oss", "llama4_text"):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                tiny_config(family), attn_implementation=attention_hook.ATTENTION_NAME
            )
        asked[family] = survey_attention(model.to_empty(device="cpu")).layers(16)
    assert all(layer.has_sinks for layer in asked["gpt_oss"])
    assert {layer.chunk for layer in asked["llama4_text"]} >= {16}
