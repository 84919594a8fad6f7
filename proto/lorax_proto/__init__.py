"""Generated gRPC stubs for the wire between router and shards."""
