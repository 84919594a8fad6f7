"""FlashAttention over paged KV, by whoever offers it here."""
