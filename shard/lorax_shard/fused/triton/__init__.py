"""Elementwise work in Triton, for GPUs."""
