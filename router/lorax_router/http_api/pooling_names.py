"""What sentence-transformers calls the ways to make one vector of a text, as bodies name them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from lorax_contract.pooling import Pooling

PoolingName = Literal["last", "mean", "cls", "max", "mean_sqrt_len", "weightedmean"]
POOLINGS: Mapping[str, Pooling] = MappingProxyType(
    {
        "last": Pooling.LAST,
        "mean": Pooling.MEAN,
        "cls": Pooling.FIRST,
        "max": Pooling.MAX,
        "mean_sqrt_len": Pooling.MEAN_SQRT,
        "weightedmean": Pooling.WEIGHTED_MEAN,
    }
)
