"""The engine loop: plans, runs and applies steps; carries out adapter orders beside them."""
