"""Paged attention in Triton: what a launch needs, and the kernels."""
