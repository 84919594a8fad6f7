"""How prompts and decodes share steps, as the options say it under our names and LoRAX's. Pure."""

from __future__ import annotations

from lorax_contract.config import Batching
from lorax_launcher.options import LauncherOptions, UsageError


def batching_of(options: LauncherOptions) -> Batching:
    """Return the mode that --batching names, or --eager-prefill as LoRAX means it."""
    if options.eager_prefill is None:
        return options.batching or "mixed"
    meant: Batching = "prefill" if options.eager_prefill else "decode"
    if options.batching not in (None, meant):
        raise UsageError(
            f"--eager-prefill {str(options.eager_prefill).lower()} is --batching {meant}, and "
            f"--batching {options.batching} was given; leave one out."
        )
    return meant


def useless_waiting(options: LauncherOptions) -> list[str]:
    """Name the options that were given and that others make useless, one line each."""
    defaults, found = LauncherOptions(), []
    is_lorax = options.scheduling_policy == "lorax"
    if options.waiting_served_ratio != defaults.waiting_served_ratio and not is_lorax:
        found.append("--waiting-served-ratio has no effect without --scheduling-policy lorax")
    counts = is_lorax or batching_of(options) == "decode"
    if options.max_waiting_tokens != defaults.max_waiting_tokens and not counts:
        found.append(
            "--max-waiting-tokens has no effect without --scheduling-policy lorax or "
            "--batching decode"
        )
    return found
