"""The shards as the router sees them: one rank over gRPC, a group of ranks, and a fake."""
