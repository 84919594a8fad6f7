"""The content-addressed store of adapters on disk."""
