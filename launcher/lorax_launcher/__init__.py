"""The launcher: resolves options, starts shards and router, watches them."""
