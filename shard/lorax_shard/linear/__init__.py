"""Linear layers with packed weights, chosen by measurement, plugged in from outside."""

from lorax_shard.linear.packed import PackedLinear
from lorax_shard.linear.replace import install

__all__ = ["PackedLinear", "install"]
