"""Classification heads of a model that is spread over ranks: each rank has them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorax_shard.model.heads import kind_of, stock_class
from lorax_shard.model.read_weights import refuse_missing
from lorax_shard.parallel.load import LoadedRank


def own_head(folder: Path, config: Any, part: LoadedRank) -> Any | None:
    """Return the checkpoint's class with its head's weights, and none of its backbone.

    None: the checkpoint has no head. Its tensors are no longer unexpected then. Raises
    StartupError (MODEL_CORRUPT) where some of them are missing.
    """
    kind = kind_of(config)
    if kind is None:
        return None
    with torch.device("meta"):
        found: Any = stock_class(kind, config)
        whole = found._from_config(config, dtype=part.model.dtype).eval().requires_grad_(False)
    names = [
        name
        for name, _ in whole.named_parameters()
        if name.split(".")[0] != whole.base_model_prefix
    ]
    part.report["unexpected_keys"].difference_update(names)
    files = part.checkpoint.files
    missing = {name for name in names if name not in files}
    refuse_missing(folder, {**part.report, "missing_keys": missing})
    for name in names:
        owner, _, own = name.rpartition(".")
        value = files[name].get_tensor(name).to(part.model.device, part.model.dtype)
        setattr(whole.get_submodule(owner), own, nn.Parameter(value, requires_grad=False))
    return whole
