from transformers import GPT2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

from lorax_shard.model.limits import attention_thresholds, position_limit


def test_positions_are_the_configs_own() -> None:
    assert position_limit(LlamaConfig(max_position_embeddings=777)) == (777, None)
    assert position_limit(GPT2Config(n_positions=99)) == (99, None)


def test_longrope_ends_where_its_frequencies_would_change() -> None:
    factors = [1.0] * 4
    config = Phi3Config(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
    )
    limit = position_limit(config)
    assert limit.max_positions == 64
    assert limit.reason is not None
    assert "beyond 64 positions" in limit.reason


def test_dynamic_rope_ends_where_it_would_begin_to_grow() -> None:
    config = LlamaConfig(
        max_position_embeddings=128,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )
    limit = position_limit(config)
    assert limit.max_positions == 128
    assert limit.reason is not None
    assert "dynamic RoPE uses other frequencies for each length beyond 128" in limit.reason


def test_the_layers_with_the_least_reach_decide() -> None:
    config = LlamaConfig(max_position_embeddings=128)
    config.rope_parameters = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "sliding_attention": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
        },
    }
    assert position_limit(config).max_positions == 32


def test_fixed_rope_scaling_keeps_all_positions() -> None:
    config = LlamaConfig(
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    )
    assert position_limit(config) == (4096, None)


def test_thresholds_are_windows_and_chunks_that_are_set() -> None:
    assert attention_thresholds(MistralConfig(sliding_window=4096)) == {"sliding_window": 4096}
    assert attention_thresholds(MistralConfig(sliding_window=None)) == {}
    assert attention_thresholds(Qwen2Config(use_sliding_window=False)) == {}
