"""Programs of published clients, each run in an environment of its own: ``python NAME.py URL MOOD_URL NAMES_URL``."""
