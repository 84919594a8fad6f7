"""What strangers send, changed and given to what reads it, in processes of their own.

A target makes cases from a seed and judges each: what is invalid is refused by an error that
is declared for it, in words, in time and within bounds; what is taken serves. ``NAMES`` has all.
"""

from __future__ import annotations

import importlib

from tests.fuzz.targets.target import Target

# Where each target is, by its name: imported when it is wanted, for some import a lot.
NAMES = {
    "http": "http_bodies:HttpBodies",
    "grpc": "public_calls:PublicCalls",
    "shard": "shard_calls:ShardCalls",
    "adapters": "adapter_files:AdapterFiles",
    "templates": "chat_templates:ChatTemplates",
    "grammars": "grammars:Grammars",
    "gguf": "gguf_models:GgufModels",
    "tokenizers": "own_tokenizers:TokenizerFiles",
}


def target_of(name: str) -> Target:
    """Return a target by its name, or by where it is (``package.module:Class``)."""
    place = f"{__name__}.{NAMES[name]}" if name in NAMES else name
    module, _, kind = place.partition(":")
    made: Target = getattr(importlib.import_module(module), kind)()
    return made
