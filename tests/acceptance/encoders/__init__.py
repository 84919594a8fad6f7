"""Acceptance points of encoders: vectors, scores, and what others make of them."""
