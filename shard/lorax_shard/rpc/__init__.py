"""The shard's gRPC face: convert, call the engine, convert."""
