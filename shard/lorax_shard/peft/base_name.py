"""Whether an adapter names another base model than the one that is served."""

from __future__ import annotations

import re

from lorax_shard.peft.errors import plain

# How a file says in what form it holds a model: the model is the same.
_FORM = re.compile(r"[.-](?:gguf|i?q\d\w*|f16|bf16|fp16|f32)$")


def foreign_base(trained_on: str, served: str) -> tuple[str, ...]:
    """Return a warning if the names are not of one model, as far as names tell; else nothing.

    Owners and folders are not compared: the same model lies in many places.
    """
    if not trained_on or not served or _model_of(trained_on) == _model_of(served):
        return ()
    return (
        f"it was made for the base model {plain(trained_on)}, and this server has {plain(served)}",
    )


def _model_of(name: str) -> str:
    name = name.rstrip("/").partition("@")[0].casefold()
    # The hub's cache: …/models--owner--name/snapshots/commit.
    cached = re.search(r"models--[^/]*--([^/]+)/snapshots/", name + "/")
    name = cached[1] if cached else name.rpartition("/")[2]
    while (shorter := _FORM.sub("", name)) != name:
        name = shorter
    return name
