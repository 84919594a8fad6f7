"""Elementwise work of a model's layers in one pass each, patched in from outside."""

from lorax_shard.fused.install import FusedModules, install

__all__ = ["FusedModules", "install"]
