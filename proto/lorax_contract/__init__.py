"""What the launcher, the router and the shards agree on. Standard library only."""
