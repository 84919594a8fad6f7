"""Which adapters are on the shards: one record each, a table of transitions, who waits."""
