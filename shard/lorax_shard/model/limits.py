"""What a config says about positions: how far they go, and where behaviour changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class PositionLimit(NamedTuple):
    """The longest sequence that is served (0: unbounded), and why it is less than the config's."""

    max_positions: int
    reason: str | None = None


def position_limit(config: Any) -> PositionLimit:
    """Return up to which length every row's positions are independent of its batch mates.

    Two kinds of RoPE choose their frequencies from the longest position of the whole forward
    pass: longrope (arXiv 2402.13753) between two sets at a threshold, dynamic NTK scaling anew
    for each length beyond the configured one. A long row would change what its batch mates
    compute, and its own keys, cached with the frequencies of its shorter past, would no longer
    be those of a forward pass over the whole row. Below that length all rows use the same ones.
    """
    configured = int(getattr(config, "max_position_embeddings", None) or 0)
    limits = [_limit_of(parameters, configured) for parameters in _rope_parameters(config)]
    return min(limits, key=lambda limit: (limit.max_positions, limit.reason is None))


def attention_thresholds(config: Any) -> dict[str, int]:
    """Return the config's numbers of tokens beyond which attention changes, by name."""
    tuned = bool(getattr(config, "attn_temperature_tuning", False))
    return {
        name: value
        for name, value in config.to_dict().items()
        # Llama 4 scales queries by how many times floor_scale lies behind them.
        # ModernBERT names its window so.
        if (
            "window" in name
            or "chunk" in name
            or name == "local_attention"
            or (tuned and name == "floor_scale")
        )
        and "layer" not in name
        and type(value) is int
        and value > 0
    }


def _limit_of(parameters: dict[str, Any], configured: int) -> PositionLimit:
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    threshold = int(parameters.get("original_max_position_embeddings") or configured)
    if "longrope" in kind and 0 < threshold < configured:
        reason = (
            f"{kind} RoPE uses other frequencies beyond {threshold} positions for the whole "
            f"batch, so sequences end there (the config names {configured})"
        )
        return PositionLimit(threshold, reason)
    if "dynamic" in kind:
        reason = (
            f"{kind} RoPE uses other frequencies for each length beyond {configured} positions "
            "and for the whole batch, so sequences end there"
        )
        return PositionLimit(configured, reason)
    return PositionLimit(configured)


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the RoPE parameters: one dictionary (it may be empty), or one for each layer type."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if found and all(isinstance(value, dict) for value in found.values()):
        yield from found.values()
    else:
        yield found
