"""LoRA in Triton: what a launch needs, the kernels, the layout of rows that they read."""
