"""The embedded default model for tests that need a real one: fetched once per machine."""

from __future__ import annotations

import functools
from pathlib import Path

from lorax_contract.cache import default_cache_dir
from lorax_shard.prepare.prepare import prepare


@functools.cache
def default_model_dir(*, with_blocks: bool = False) -> Path:
    """Return the folder of SmolLM2-135M-Instruct; the first call on a machine takes a minute.

    ``with_blocks``: those of its GGUF file lie beside it.
    """
    prepared = prepare(
        None,
        revision=None,
        source="hub",
        cache_dir=default_cache_dir(),
        trust_remote_code=False,
        progress=lambda event: None,
        with_blocks=with_blocks,
    )
    return prepared.model_dir
