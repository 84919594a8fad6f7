"""The scheduler over a virtual clock: the same core, with a cost model in place of the shards."""
