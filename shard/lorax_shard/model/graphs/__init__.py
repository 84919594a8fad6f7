"""Decode steps as graphs: captured once, replayed with other numbers."""
