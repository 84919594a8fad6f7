"""Ranks of a group on machines of their own."""
