"""From logits to tokens: any mix of sampling parameters, the same draw in every batch."""
