"""Acceptance runs: each name is a list of points, measured and printed as a table."""
