"""Which implementations the shards use: what was asked for, or what follows from other options."""

from __future__ import annotations

from lorax_contract.config import Device
from lorax_launcher.options import LauncherOptions


def attention_backend(options: LauncherOptions, device: Device) -> str:
    """Return what was asked for; where that is left open, what reads the KV cache asked for."""
    if options.attention_backend != "auto":
        return options.attention_backend
    if options.disable_custom_kernels:
        return "sdpa"
    if options.kv_cache_dtype == "auto":
        return "auto"
    return "sdpa" if device == "cpu" else "triton"


def linear_backend(options: LauncherOptions) -> str:
    """Return what was asked for; torch's own where no custom kernels are wanted."""
    is_plain = options.disable_custom_kernels and options.linear_backend == "auto"
    return "torch" if is_plain else options.linear_backend


def elementwise_backend(options: LauncherOptions) -> str:
    """Return what was asked for; the model's own code where no custom kernels are wanted."""
    is_plain = options.disable_custom_kernels and options.elementwise_backend == "auto"
    return "torch" if is_plain else options.elementwise_backend


def lora_backend(options: LauncherOptions) -> str:
    """Return what was asked for; torch's own where no custom kernels are wanted."""
    is_plain = options.disable_custom_kernels or options.disable_sgmv
    return "cpu" if is_plain and options.lora_backend == "auto" else options.lora_backend
