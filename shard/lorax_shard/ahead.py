"""What a start on a CPU begins before it imports torch, since that takes one core for seconds."""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from pathlib import Path

from lorax_contract.config import ShardConfig
from lorax_shard import huge_pages
from lorax_shard.system_memory import available_bytes

# Linears that are packed into memory of their own.
_PACKED = ("auto", "panel", "tiles")
# A float32 takes at least so many times the bytes of its code.
_QUANTIZED = 4
# Mappings are not used to their ends.
_MARGIN = 16
# Turns, of some fifty nanoseconds, that a thread looks whether the others have done their part before
# it sleeps. Of a pass's kernels the next one comes sooner than that.
_TURNS = 4000
# Nothing has been checked yet: what is filled must not be what is lacking later.
_SHARE = 0.25


def begin(config: ShardConfig) -> None:
    """Fill memory for packed weights; ``huge_pages.release_ahead`` gives back what is not used."""
    if _num_cores() > 1:
        needed = packed_bytes(config)
        if needed * config.ranks_on_device <= _SHARE * available_bytes():
            huge_pages.fill_ahead(needed)


def let_waiting_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say, before OpenMP is loaded, that a thread looks for others for a fifth of a millisecond only.

    Else it does so for ten and more: longer than a processor is lent to somebody else, so that
    threads of which some processor is wanted elsewhere too do nothing but look for each other.
    What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(_TURNS))


def packed_bytes(config: ShardConfig) -> int:
    """Return about how many bytes a rank's packed weights will take, 0 where none are packed."""
    if config.device != "cpu" or config.linear_backend not in _PACKED:
        return 0
    if config.dtype not in ("auto", "float32", "bfloat16"):
        return 0
    folder = Path(config.model_dir)
    try:
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = str(document.get("dtype") or document.get("torch_dtype"))
    except (OSError, ValueError, AttributeError):
        return 0  # whoever reads the model says what is wrong with it
    if stored in ("float16", "bfloat16"):
        num_bytes *= 2
    if config.quantize != "none":
        num_bytes //= _QUANTIZED
    elif config.dtype == "bfloat16":
        num_bytes //= 2
    num_bytes //= config.world_size
    return num_bytes + num_bytes // _MARGIN


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
