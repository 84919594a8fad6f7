"""What a config says about positions: how far they go, and where behaviour changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

# RoPE kinds that choose their frequencies from the longest position of the whole
# forward pass, so that a long row would change what its batch mates compute.
_BATCH_DEPENDENT_ROPE = ("longrope", "dynamic")


class PositionLimit(NamedTuple):
    """The longest sequence that is served (0: unbounded), and why it is less than the config's."""

    max_positions: int
    reason: str | None = None


def position_limit(config: Any) -> PositionLimit:
    """Return up to which length every row's positions are independent of its batch mates.

    RoPE with a threshold computes short rows with other frequencies once a long
    row is in the batch; below the threshold all rows use the same ones.
    """
    configured = int(getattr(config, "max_position_embeddings", None) or 0)
    for parameters in _rope_parameters(config):
        kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
        if not any(name in kind for name in _BATCH_DEPENDENT_ROPE):
            continue
        threshold = int(parameters.get("original_max_position_embeddings") or configured)
        if "longrope" in kind and 0 < threshold < configured:
            reason = (
                f"{kind} RoPE uses other frequencies beyond {threshold} positions for the whole "
                f"batch, so sequences end there (the config names {configured})"
            )
            return PositionLimit(threshold, reason)
    return PositionLimit(configured)


def attention_thresholds(config: Any) -> dict[str, int]:
    """Return the config's numbers of tokens beyond which attention changes, by name."""
    tuned = bool(getattr(config, "attn_temperature_tuning", False))
    return {
        name: value
        for name, value in config.to_dict().items()
        # Llama 4 scales queries by how many times floor_scale lies behind them.
        if ("window" in name or "chunk" in name or (tuned and name == "floor_scale"))
        and "layer" not in name
        and type(value) is int
        and value > 0
    }


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the RoPE parameters: one dictionary, or one for each layer type."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if all(isinstance(value, dict) for value in found.values()):
        yield from found.values()
    else:
        yield found
