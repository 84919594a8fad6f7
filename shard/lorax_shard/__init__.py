"""The shard process: one tensor-parallel rank of the model behind gRPC."""
