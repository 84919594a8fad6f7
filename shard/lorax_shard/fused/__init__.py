"""Elementwise work of a model's layers in one pass each, patched in from outside."""

from lorax_shard.fused.install import FusedModules, install
from lorax_shard.fused.rotary import LostRotationError, rotations_of

__all__ = ["FusedModules", "LostRotationError", "install", "rotations_of"]
