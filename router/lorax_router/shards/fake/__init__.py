"""FakeShard: a scriptable, deterministic shard group in memory."""
