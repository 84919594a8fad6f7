"""Drawing tokens in Triton, for GPUs."""
