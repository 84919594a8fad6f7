"""Adapters by name: resolving, sharing, managing, listing."""
