"""The demo adapters: their tasks, the data that teaches them, and how they are judged."""
