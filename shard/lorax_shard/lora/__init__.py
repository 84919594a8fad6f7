"""LoRA compute: any mix of adapters, ranks and base rows in one ragged step."""
