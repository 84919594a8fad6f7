"""LoRAX's own dialect."""
