"""Paged attention: the KV cache, the step's metadata, and backends behind one interface."""
