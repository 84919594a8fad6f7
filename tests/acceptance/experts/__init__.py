"""Adapters on the experts of mixtures."""
