"""Fronts and core: HTTP in processes of its own, in front of the one that holds the service."""
