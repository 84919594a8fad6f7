"""The demo classifiers: their labels, the texts that teach them, and how they are measured."""
