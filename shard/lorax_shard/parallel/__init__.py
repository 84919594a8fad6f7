"""Tensor parallelism: which rank holds what, how it is read, and where ranks meet."""
