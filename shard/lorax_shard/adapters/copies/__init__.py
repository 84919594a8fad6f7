"""Stored adapters on their way from rank 0's store to that of a rank on another machine."""
