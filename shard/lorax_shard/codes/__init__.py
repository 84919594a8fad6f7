"""Checkpoints that hold codes: which numbers their tensors stand for."""
