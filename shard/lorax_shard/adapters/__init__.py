"""Adapters before they compute: sources, the on-disk store, formats, merging."""
